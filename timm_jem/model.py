"""JEM: a timm classifier seen as an energy-based model."""

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.data.model_config import resolve_input_data_config
from timm.models import resolve_model_input_args
from timm.utils import unwrap_model
from torch import Tensor, nn

from timm_jem.card import CARD_FILE, PICTURES, model_card
from timm_jem.chains import CHAINS_FILE, Chains
from timm_jem.energy import energy
from timm_jem.errors import InputError, check_whole, one_line
from timm_jem.folder import read_folder, write_folder
from timm_jem.hub import fetch, push
from timm_jem.models.names import BUILD_ERRORS, check_name
from timm_jem.sampling import SGLDConfig, frozen, sgld, uniform_noise

__all__ = ["JEM", "create_model", "wrap"]

# Denormalised pixels lie in [-1, 1]; chains and noise leave it by a little, images in 0..255 by far.
_FAR_FROM_PIXELS = 20.0


class JEM(nn.Module):
    """The joint energy model of a classifier: p(x, y) ∝ exp f(x)[y] (JEM, arXiv 1912.03263).

    Every method takes and returns *model input* (normalised by the backbone's mean and std), shape (B, C, H, W).
    Chains, noise and step sizes live in *pixels* in [-1, 1]; :meth:`normalize` and :meth:`denormalize` go between.
    The state dict is the backbone's, key by key. Build it with :func:`wrap` or :func:`create_model`.

    Args:
        backbone: maps model input to logits, shape (B, num_classes); has an attribute ``num_classes`` > 0.
        data_config: timm's data configuration: ``input_size`` (C, H, W), ``mean``, ``std`` ([0, 1] pixel units), and
            what else timm keeps there.
        class_names: names of the classes in order, or None.
        sgld: how chains move; the defaults of :meth:`sample`.
        provenance: what the model was trained on and how; JSON data, kept with it.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        data_config: dict[str, Any],
        class_names: list[str] | None = None,
        sgld: SGLDConfig = SGLDConfig(),
        provenance: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(sgld, SGLDConfig):
            raise InputError(f"sgld is a {type(sgld).__name__}: give a timm_jem.SGLDConfig")
        if class_names is not None and (isinstance(class_names, str) or len(class_names) != backbone.num_classes):
            raise InputError(f"{len(class_names)} class names for {backbone.num_classes} classes: give one name a class")
        self.backbone = backbone
        self.data_config = dict(data_config)
        self.class_names = None if class_names is None else [str(name) for name in class_names]
        self.sgld = sgld
        self.provenance = dict(provenance or {})
        self._chains: Chains | None = None
        self._chains_file: Path | None = None
        if len(self.input_size) != 3:
            raise InputError(f"input_size is {self.input_size}: give (C, H, W)")
        for side in self.input_size:
            check_whole("input_size", side, 1)
        for name in ("mean", "std"):
            self.register_buffer(name, self._per_channel(name), persistent=False)
        self.register_state_dict_post_hook(_drop_backbone_prefix)
        self.register_load_state_dict_pre_hook(_add_backbone_prefix)

    def _per_channel(self, name: str) -> Tensor:
        channels, reference = self.input_size[0], next(self.backbone.parameters(), torch.empty(0))
        try:
            values = torch.tensor(self.data_config[name], dtype=torch.float64, device="cpu").expand(channels)
        except (RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"{name} is {self.data_config[name]!r}: give one number a channel, {channels}") from error
        if not values.isfinite().all() or (name == "std" and (values <= 0).any()):
            raise InputError(f"{name} is {self.data_config[name]!r}: give finite numbers{', above 0' * (name == 'std')}")
        dtype = torch.promote_types(reference.dtype, torch.float32)
        return values.reshape(1, channels, 1, 1).to(reference.device, dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "JEM":
        # Half precision would round the normalisation, and to_empty would lose it.
        super()._apply(fn, recurse)
        self.mean, self.std = self._per_channel("mean"), self._per_channel("std")
        return self

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights, and so of model input."""
        return next((p.dtype for p in self.backbone.parameters() if p.is_floating_point()), self.mean.dtype)

    @property
    def num_classes(self) -> int:
        return self.backbone.num_classes

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(C, H, W) of the images this model is for, and of those that :meth:`sample` makes."""
        return tuple(self.data_config["input_size"])

    def forward(self, x: Tensor) -> Tensor:
        """Logits f(x), shape (B, num_classes): the backbone's own, bit for bit."""
        return self.backbone(x)

    def normalize(self, u: Tensor) -> Tensor:
        """Pixels in [-1, 1] to model input: (u − (2·mean − 1)) / (2·std); the identity for mean = std = 0.5."""
        return ((u - (2 * self.mean - 1)) / (2 * self.std)).to(self.dtype)

    def denormalize(self, x: Tensor) -> Tensor:
        """Model input to pixels in [-1, 1]: the inverse of :meth:`normalize`."""
        return x * (2 * self.std) + (2 * self.mean - 1)

    def energy(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """E(x) = −logsumexp f(x), or E(x, y) = −f(x)[y]; shape (B,). Lower energy = likelier.

        Args:
            x: model input, floating point, shape (B, C, H, W).
            y: class labels, integers, shape (B,).

        Raises:
            InputError: ``x`` of wrong shape, dtype or range, or ``y`` of wrong shape, dtype or range.
        """
        self._check_x(x)
        y = None if y is None else self._check_y(y, len(x), x.device)
        return energy(self._logits(x), y)

    def log_density(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """log p(x), or log p(x, y), up to the constant −log Z: −energy(x, y). Shapes and errors as there."""
        return -self.energy(x, y)

    def score(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """∇ₓ log p(x), or ∇ₓ log p(x, y), with respect to model input; shape of ``x``, detached.

        Works under ``no_grad``, leaves parameters without gradients, and is that of :meth:`energy` in the module's
        present train or eval mode, where a forward in train mode moves BatchNorm statistics. Errors as :meth:`energy`.
        """
        self._check_x(x)
        y = None if y is None else self._check_y(y, len(x), x.device)
        with torch.inference_mode(False), torch.enable_grad():
            x = x.detach().clone().requires_grad_(True)
            y = None if y is None else y.clone()
            return -torch.autograd.grad(energy(self._logits(x), y).sum(), x)[0]

    def pixel_energy(self, u: Tensor, y: Tensor | None = None) -> Tensor:
        """The energy of pixels in [-1, 1], shape (B, C, H, W), unchecked: what chains descend; shape (B,)."""
        return energy(self._logits(self.normalize(u)), y)

    def _logits(self, x: Tensor) -> Tensor:
        logits = self(x)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] != self.num_classes:
            kind = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise InputError(
                f"the backbone gives {kind} instead of logits (B, {self.num_classes}): build it with pooling and one head, "
                "and call set_distilled_training(False) on a distilled one"
            )
        return logits

    def sample(
        self,
        n: int | None = None,
        *,
        y: Tensor | list[int] | int | None = None,
        generator: torch.Generator | None = None,
        num_steps: int | None = None,
        sgld_config: SGLDConfig | None = None,
        init: Tensor | Literal["buffer"] | None = None,
        batch_size: int = 256,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Draw images by SGLD chains, in eval mode; the model and its flags are left as they were.

        Args:
            n: how many; may be left out where ``y`` or ``init`` tells.
            y: classes to draw, integers, shape (n,), or one for all: chains of E(x, y). None: chains of E(x), but
                published chains that have classes go on each under its own.
            generator: the only source of randomness (None: PyTorch's global one). The same seed gives the same
                chains, whatever ``batch_size``.
            num_steps: length of the chains; None: for fresh chains the length that was found best after training
                (``sgld.sample_steps``), for others that of a training iteration (``sgld.num_steps``).
            sgld_config: instead of the model's own settings.
            init: where chains start: model input, shape (n, C, H, W); "buffer": distinct published chains; None:
                uniform noise.
            batch_size: how many chains go through the network at once.
            on_step: called with (steps done, pixels) after each step.

        Returns:
            Model input, shape (n, C, H, W); ``jem.denormalize`` makes pixels of it.

        Raises:
            InputError: ``n`` that disagrees with ``y`` or ``init``, ``y`` out of range, ``num_steps`` < 1, more
                published chains than there are.
        """
        config = self.sgld if sgld_config is None else sgld_config
        if not isinstance(config, SGLDConfig):
            raise InputError(f"sgld_config is a {type(config).__name__}: give a timm_jem.SGLDConfig")
        if not (generator is None or isinstance(generator, torch.Generator)):
            raise InputError(f"generator is a {type(generator).__name__}: give torch.Generator().manual_seed(seed)")
        if num_steps is None:
            num_steps = config.num_steps if init is not None else config.sample_steps or config.num_steps
        if isinstance(init, str) and init != "buffer":
            raise InputError(f"init is {init!r}: give model input, 'buffer' or None")
        check_whole("num_steps", num_steps, 1)
        check_whole("batch_size", batch_size, 1)
        y = None if y is None else self._labels(y)
        if n is None:
            told = [len(t) for t in (init, y) if isinstance(t, Tensor) and t.ndim]
            if not told:
                raise InputError("sample doesn't know how many images to draw: give n")
            n = told[0]
        check_whole("n", n, 1)
        device = self.mean.device
        if y is not None:
            y = self._check_y(y.expand(n) if y.ndim == 0 else y, n, device)
        if init is None:
            u = uniform_noise((n, *self.input_size), generator=generator, device=device)
        elif isinstance(init, str):
            if self.chains is None:
                raise InputError("this model has no published chains: leave init out, and chains start from noise")
            u, labels = self.chains.draw(n, y, generator)
            u, y = u.to(device), y if y is not None or labels is None else labels.to(device)
        else:
            self._check_x(init)
            if len(init) != n:
                raise InputError(f"init holds {len(init)} images and n is {n}: make them agree")
            u = self.denormalize(init.to(device))
        with frozen(self):
            u = sgld(
                self.pixel_energy,
                u,
                config,
                y=y,
                generator=generator,
                num_steps=num_steps,
                denoise_steps=config.denoise_steps,
                batch_size=batch_size,
                on_step=on_step,
            )
        return self.normalize(u)

    @property
    def chains(self) -> Chains | None:
        """Published chains, read from their file when first asked for; None: there are none. They are saved with the model."""
        if self._chains is None and self._chains_file is not None:
            self._chains = Chains.load(self._chains_file, self.input_size, self.num_classes)
        return self._chains

    @chains.setter
    def chains(self, chains: Chains | None) -> None:
        self._chains, self._chains_file = chains, None

    def save_pretrained(self, save_directory: str | os.PathLike, *, replay_buffer: bool = True) -> None:
        """Write a folder that :meth:`from_pretrained` and plain timm read; or raise, and leave the folder as it was.

        The saved model is rebuilt by plain timm and its logits compared before anything is moved into place, so that
        layers replaced behind timm's back are refused, not lost.

        Args:
            save_directory: made if it isn't there; other files in it are left alone.
            replay_buffer: with published chains, if the model has some.

        Raises:
            InputError: a backbone that plain timm would rebuild as another function, or provenance that is not JSON.
        """
        ours = {"sgld": asdict(self.sgld), "provenance": self.provenance}
        data_config = {k: v for k, v in self.data_config.items() if k != "fixed_input_size"}
        chains = self.chains if replay_buffer else None
        write_folder(self.backbone, save_directory, ours, class_names=self.class_names, data_config=data_config, chains=chains)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Push model using timm_jem",
        private: bool | None = None,
        token: str | bool | None = None,
        branch: str | None = None,
        create_pr: bool = False,
        replay_buffer: bool = True,
        pictures: str | os.PathLike | None = None,
        overwrite_card: bool = False,
    ) -> str:
        """Push the model with its card to the Hub in one commit; names and defaults are ``ModelHubMixin.push_to_hub``'s.

        Args:
            repo_id: "user/name"; made if it isn't there.
            commit_message, private, token, branch, create_pr: as in ``huggingface_hub.ModelHubMixin``.
            replay_buffer: with published chains, if the model has some.
            pictures: a folder, e.g. a run's, whose pictures go with the card.
            overwrite_card: replace a README.md that someone wrote; otherwise it is kept, with a warning.

        Returns:
            The commit's URL.

        Raises:
            InputError: what :meth:`save_pretrained` refuses, before anything is sent; or what the Hub refuses.
        """
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            self.save_pretrained(folder, replay_buffer=replay_buffer)
            shown = [name for name in PICTURES if pictures is not None and (Path(pictures) / name).is_file()]
            for name in shown:
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(Path(pictures) / name, folder / name)
            card = model_card(
                repo_id=repo_id,
                architecture=_name(self.backbone),
                parameters=sum(p.numel() for p in self.parameters()),
                input_size=self.input_size,
                class_names=self.class_names,
                num_classes=self.num_classes,
                sgld=asdict(self.sgld),
                provenance=self.provenance,
                has_chains=(folder / CHAINS_FILE).is_file(),
                pictures=shown,
            )
            (folder / CARD_FILE).write_text(card, encoding="utf-8")
            return push(
                folder,
                repo_id,
                commit_message=commit_message,
                private=private,
                token=token,
                branch=branch,
                create_pr=create_pr,
                overwrite_card=overwrite_card,
            )

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        replay_buffer: bool = True,
    ) -> "JEM":
        """Load a joint energy model from a folder or a Hub repository, in eval mode.

        A plain timm repository works as well: it becomes a joint energy model with the paper's sampling settings. Only
        JSON and safetensors are read, and nothing in them is trusted.

        Args:
            name: folder written by :meth:`save_pretrained`, or a Hub repository "user/name".
            revision, token, cache_dir, local_files_only, force_download: as in ``huggingface_hub.hf_hub_download``.
            replay_buffer: with published chains, where there are some; they are read when first used.

        Raises:
            InputError: nothing there, a folder that is no such model, or what the Hub refuses.
        """
        folder = Path(name)
        if not folder.is_dir():
            folder = fetch(
                str(name),
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                force_download=force_download,
                replay_buffer=replay_buffer,
            )
        try:
            backbone, ours = read_folder(folder)
            jem = wrap(backbone, sgld=_sgld_config(ours.get("sgld", {})), provenance=ours.get("provenance"))
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        if replay_buffer and (folder / CHAINS_FILE).is_file():
            jem._chains_file = folder / CHAINS_FILE
        return jem.eval()

    def _check_x(self, x: Tensor) -> None:
        channels, height, width = self.input_size
        expected = f"(B, {channels}, {height}, {width})"
        if not isinstance(x, Tensor):
            raise InputError(f"x is a {type(x).__name__}: give a tensor of model input, shape {expected}")
        if x.ndim != 4 or x.shape[1] != channels:
            raise InputError(f"x has shape {tuple(x.shape)}: give model input of shape {expected}")
        if self.data_config.get("fixed_input_size") and x.shape[2:] != (height, width):
            raise InputError(f"x has shape {tuple(x.shape)}: this backbone takes {expected} only; resize the images")
        if not x.is_floating_point():
            raise InputError(f"x has dtype {x.dtype}: give model input, e.g. jem.normalize(images / 127.5 - 1)")
        if x.dtype != self.dtype and not torch.is_autocast_enabled(x.device.type):
            raise InputError(f"x has dtype {x.dtype} and the model {self.dtype}: give x.to({self.dtype})")
        if x.numel() and not torch.compiler.is_compiling():
            farthest = float(self.denormalize(x.detach()).abs().amax())
            if not farthest <= _FAR_FROM_PIXELS:
                raise InputError(
                    f"x is {farthest:.0f} in pixels, far outside [-1, 1]: give model input, "
                    "e.g. jem.normalize(images / 127.5 - 1) for images in 0..255"
                )

    def _check_y(self, y: Tensor, n: int, device: torch.device) -> Tensor:
        y = self._labels(y).to(device)
        if y.dtype == torch.bool or y.is_floating_point() or y.is_complex():
            raise InputError(f"y has dtype {y.dtype}: give integer class labels")
        if y.shape != (n,):
            raise InputError(f"y has shape {tuple(y.shape)} for {n} images: give one label an image, shape ({n},)")
        if n and not torch.compiler.is_compiling():
            low, high = (int(v) for v in torch.aminmax(y))
            if low < 0 or high >= self.num_classes:
                raise InputError(
                    f"y holds the label {low if low < 0 else high}: this model's classes are 0 to {self.num_classes - 1}"
                )
        return y.long()

    def _labels(self, y: Tensor | list[int] | int) -> Tensor:
        try:
            return torch.as_tensor(y)
        except (RuntimeError, TypeError, ValueError) as error:
            raise InputError(
                f"y is a {type(y).__name__} that holds no labels: give integers, 0 to {self.num_classes - 1}"
            ) from error


def _drop_backbone_prefix(module: nn.Module, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    for key in [key for key in state_dict if key.startswith(f"{prefix}backbone.")]:
        state_dict[prefix + key[len(prefix) + len("backbone.") :]] = state_dict.pop(key)


def _add_backbone_prefix(module: nn.Module, state_dict: dict, prefix: str, *args) -> None:
    for key in [key for key in state_dict if key.startswith(prefix)]:
        state_dict[f"{prefix}backbone.{key[len(prefix) :]}"] = state_dict.pop(key)


def wrap(
    model: nn.Module,
    *,
    input_size: tuple[int, int, int] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    class_names: list[str] | None = None,
    sgld: SGLDConfig = SGLDConfig(),
    provenance: dict[str, Any] | None = None,
) -> JEM:
    """See a timm classifier as a joint energy model; the model itself is not changed.

    Args:
        model: any timm classifier.
        input_size: (C, H, W) of the images it is for; None: as the model's configuration says.
        mean, std: normalisation, [0, 1] pixel units; None: as the model's configuration says.
        class_names: names of the classes; None: those that the model's configuration has, if any.
        sgld, provenance: see :class:`JEM`.

    Raises:
        InputError: not a timm model, no classification head, or an input size that the model can't take.

    Warns:
        UserWarning: the head's weights are all zero, so that energies are flat in x and chains can't move.
    """
    if not isinstance(model, nn.Module) or getattr(model, "pretrained_cfg", None) is None:
        raise InputError(f"{type(model).__name__} is not a timm model: build it with timm.create_model")
    if unwrap_model(model) is not model:
        raise InputError(
            "this model is compiled or wrapped already: wrap the timm model first, then compile or prepare the result"
        )
    if getattr(model, "num_classes", 0) < 1:
        raise InputError(
            f"{_name(model)} has no classification head: build it with num_classes=N, or call reset_classifier(N); "
            "encoders that have none (names ending in _enc) can't be joint energy models"
        )
    requested = {"input_size": input_size, "mean": mean, "std": std}
    for key in ("mean", "std"):
        values = model.pretrained_cfg.get(key)
        if requested[key] is None and values and len(set(values)) == 1:
            requested[key] = values[:1]  # the same for any number of channels
    try:
        data_config = resolve_input_data_config(model, {k: v for k, v in requested.items() if v is not None})
    except (AssertionError, TypeError, ValueError) as error:
        raise InputError(f"{_name(model)}: {one_line(error)}") from error
    data_config["fixed_input_size"] = bool(
        getattr(model, "_traits", {}).get("fixed_input_size", model.pretrained_cfg.get("fixed_input_size", False))
    )
    _warn_of_zero_head(model)
    if class_names is None:
        names = model.pretrained_cfg.get("label_names")
        class_names = list(names) if isinstance(names, (list, tuple)) and len(names) == model.num_classes else None
    return JEM(model, data_config=data_config, class_names=class_names, sgld=sgld, provenance=provenance)


def create_model(
    name: str,
    pretrained: bool = False,
    *,
    input_size: tuple[int, int, int] | None = None,
    class_names: list[str] | None = None,
    sgld: SGLDConfig = SGLDConfig(),
    **kwargs: Any,
) -> JEM:
    """``timm.create_model`` and :func:`wrap` in one.

    Args:
        name: any name of ``timm.list_models()``, this package's ``wrn_*`` included, or timm's "hf-hub:" and "local-dir:".
        pretrained: load pretrained weights.
        input_size: (C, H, W) of the images; sets ``in_chans``, and ``img_size`` where the backbone needs it.
        class_names, sgld: see :func:`wrap`.
        **kwargs: to ``timm.create_model``: ``num_classes``, ``drop_rate``, ...

    Raises:
        InputError: an unknown name (with close matches), or what :func:`wrap` refuses.
    """
    check_name(name)
    arguments = {"model_name": name, **kwargs}
    if input_size is not None:
        try:
            arguments = resolve_model_input_args(name, {"input_size": input_size}, **kwargs)
        except (AssertionError, TypeError, ValueError) as error:
            raise InputError(f"{name}: {one_line(error)}") from error
    try:
        backbone = timm.create_model(pretrained=pretrained, **arguments)
    except BUILD_ERRORS as error:
        raise InputError(f"{name} can't be built with these arguments ({one_line(error)})") from error
    return wrap(backbone, input_size=input_size, class_names=class_names, sgld=sgld)


def _sgld_config(settings: dict[str, Any]) -> SGLDConfig:
    try:
        return SGLDConfig(**settings)
    except TypeError as error:
        raise InputError(f"the sgld settings of config.json are not this version's ({one_line(error)})") from error


def _name(model: nn.Module) -> str:
    return model.pretrained_cfg.get("architecture") or type(model).__name__


def _warn_of_zero_head(model: nn.Module) -> None:
    head = model.get_classifier()
    heads = head if isinstance(head, (tuple, list)) else (head,)
    weights = [p for h in heads if isinstance(h, nn.Module) for k, p in h.named_parameters() if k.endswith("weight")]
    if weights and not any(w.is_meta or bool(w.any()) for w in weights):
        warnings.warn(
            f"the head of {_name(model)} is all zeros, so its energy is flat and chains can't move: "
            f"call model.reset_classifier({model.num_classes}) before wrap, or load trained weights",
            stacklevel=3,
        )
