"""JEM: a timm classifier seen as an energy-based model."""

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from timm_jem.backbone import architecture
from timm_jem.energy import energy
from timm_jem.errors import InputError, check_whole
from timm_jem.hub.folder import write_folder
from timm_jem.hub.publish import publish
from timm_jem.hub.published_chains import PublishedChains
from timm_jem.inputs import as_labels, check_drawing, check_labels, check_model_input, how_many
from timm_jem.modes import frozen
from timm_jem.sampling import SGLDConfig, chain_generators, draw_seeds, sgld, uniform_noise

__all__ = ["JEM"]


class JEM(nn.Module):
    """The joint energy model of a classifier: p(x, y) ∝ exp f(x)[y] (JEM, arXiv 1912.03263).

    Every method takes and returns *model input* (normalised by the backbone's mean and std), shape (B, C, H, W).
    Chains, noise and step sizes live in *pixels* in [-1, 1]; :meth:`normalize` and :meth:`denormalize` go between.
    The state dict is the backbone's, key by key. Build it with :func:`timm_jem.wrap` or
    :func:`timm_jem.create_model`, load it with :func:`timm_jem.from_pretrained`.

    Args:
        backbone: maps model input to logits, shape (B, num_classes); has an attribute ``num_classes`` > 0.
        data_config: timm's data configuration: ``input_size`` (C, H, W), ``mean``, ``std`` ([0, 1] pixel units), and
            what else timm keeps there.
        class_names: names of the classes in order, or None.
        sgld: how chains move; the defaults of :meth:`sample`.
        provenance: what the model was trained on and how; JSON data, kept with it.
        fixed_input_size: whether the backbone takes images of that size only.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        data_config: dict[str, Any],
        class_names: list[str] | None = None,
        sgld: SGLDConfig = SGLDConfig(),
        provenance: dict[str, Any] | None = None,
        fixed_input_size: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(sgld, SGLDConfig):
            raise InputError(f"sgld is a {type(sgld).__name__}: give a timm_jem.SGLDConfig")
        if class_names is not None and (isinstance(class_names, str) or len(class_names) != backbone.num_classes):
            raise InputError(f"{len(class_names)} class names for {backbone.num_classes} classes: give one name per class")
        self.backbone = backbone
        self.data_config = dict(data_config)
        self.class_names = None if class_names is None else [str(name) for name in class_names]
        self.sgld = sgld
        self.fixed_input_size = fixed_input_size
        self.provenance = dict(provenance or {})
        self._chains: PublishedChains | Path | None = None  # a file is read when they are first asked for
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
            raise InputError(f"{name} is {self.data_config[name]!r}: give one number per channel, {channels}") from error
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
        seeds: Sequence[int] | Tensor | None = None,
        num_steps: int | None = None,
        sgld_config: SGLDConfig | None = None,
        init: Tensor | Literal["buffer"] | None = None,
        batch_size: int = 256,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Draw images by SGLD chains, in eval mode; the model and its flags are left as they were.

        An image is a function of its seed, its class and the model alone, whatever is drawn with it and however it is split
        into batches, up to rounding: some networks, and all on several threads or a GPU, round by the size of a batch. On one
        thread of a CPU wrn_10_1, resnet18 and a small ViT gave the same images bit for bit, and wrn_10_2 and convnext_atto
        within 6e-6 in pixels after 100 steps, untrained; the steeper the energy, the further rounding takes chains apart.

        Args:
            n: how many; may be left out where ``y``, ``seeds`` or ``init`` tells.
            y: classes to draw, integers, shape (n,), or one for all: chains of E(x, y). None: chains of E(x), but
                published chains that have classes go on each under its own.
            generator: what draws the seeds, or the published chains and then the seeds (None: PyTorch's global one). The
                first images of more are the same.
            seeds: one a chain instead, whole numbers from 0 to 2³² − 1.
            num_steps: length of the chains; None: for fresh chains the length that was found best after training
                (``sgld.sample_steps``), for others that of a training iteration (``sgld.num_steps``).
            sgld_config: instead of the model's own settings.
            init: where chains start: model input, shape (n, C, H, W); "buffer": distinct published chains; None:
                uniform noise.
            batch_size: the most chains that go through the network at once, though never fewer than four do.
            on_step: called with (steps done, pixels) after each step.

        Returns:
            Model input, shape (n, C, H, W); ``jem.denormalize`` makes pixels of it.

        Raises:
            InputError: ``n``, ``y``, ``seeds`` and ``init`` that disagree, ``y`` or seeds out of range, ``num_steps`` < 1,
                more published chains than there are, seeds with a generator or for published chains.
        """
        config = self.sgld if sgld_config is None else sgld_config
        if not isinstance(config, SGLDConfig):
            raise InputError(f"sgld_config is a {type(config).__name__}: give a timm_jem.SGLDConfig")
        check_drawing(init, generator, seeds, batch_size, on_step)
        if num_steps is None:
            num_steps = config.num_steps if init is not None else config.sample_steps or config.num_steps
        check_whole("num_steps", num_steps, 1)
        generators = None if seeds is None else chain_generators(seeds)
        y = None if y is None else as_labels(y, self.num_classes)
        n, device = how_many(n, init, y, generators), self.mean.device
        if y is not None:
            y = self._check_y(y.expand(n) if y.ndim == 0 else y, n, device)
        if isinstance(init, Tensor):
            self._check_x(init)
            u = self.denormalize(init.to(device))
        elif init == "buffer":
            if self.chains is None:
                raise InputError("this model has no published chains: leave init out, and chains start from noise")
            u, labels = self.chains.draw(n, y, generator)
            u, y = u.to(device), y if y is not None or labels is None else labels.to(device)
        generators = generators or chain_generators(draw_seeds(n, generator))
        if init is None:
            u = uniform_noise((n, *self.input_size), generator=generators, device=device, dtype=torch.float32)
        options = {"num_steps": num_steps, "denoise_steps": config.denoise_steps, "batch_size": batch_size, "on_step": on_step}
        with frozen(self):
            return self.normalize(sgld(self.pixel_energy, u, config, y=y, generator=generators, **options))

    @property
    def chains(self) -> PublishedChains | None:
        """Published chains, read from their file when first asked for; None: there are none. They are saved with the model."""
        if isinstance(self._chains, Path):
            self._chains = PublishedChains.load(self._chains, self.input_size, self.num_classes)
        return self._chains

    @chains.setter
    def chains(self, chains: PublishedChains | Path | None) -> None:
        self._chains = chains.resolve() if isinstance(chains, Path) else chains

    def save_pretrained(self, save_directory: str | os.PathLike, *, replay_buffer: bool = True) -> None:
        """Write a folder that :func:`timm_jem.from_pretrained` and plain timm read; or raise, and leave the folder as it was.

        The saved model is rebuilt by plain timm and its logits compared before anything is moved into place, so that
        layers replaced behind timm's back are refused, not lost.

        Args:
            save_directory: made if it isn't there; other files in it are left alone.
            replay_buffer: with published chains, if the model has some.

        Raises:
            InputError: a backbone that plain timm would rebuild as another function, or provenance that is not JSON.
        """
        ours = {"sgld": asdict(self.sgld), "provenance": self.provenance}
        write_folder(
            self.backbone,
            save_directory,
            ours,
            class_names=self.class_names,
            data_config=self.data_config,
            chains=self.chains if replay_buffer else None,
        )

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
        pictures: Mapping[str, str | os.PathLike] | None = None,
        overwrite_card: bool = False,
    ) -> str:
        """Push the model with its card to the Hub in one commit; names and defaults are ``ModelHubMixin.push_to_hub``'s.

        Args:
            repo_id: "user/name"; made if it isn't there.
            commit_message, private, token, branch, create_pr: as in ``huggingface_hub.ModelHubMixin``.
            replay_buffer: with published chains, if the model has some.
            pictures: files for the card to show, by their names there: "samples.png", "buffer.png",
                "evaluation/reliability.png", "evaluation/ood_auroc.png", "evaluation/pgd_linf.png".
            overwrite_card: replace a README.md that someone wrote; otherwise it is kept, with a warning.

        Returns:
            The commit's URL.

        Raises:
            InputError: what :meth:`save_pretrained` refuses, before anything is sent; or what the Hub refuses.
        """
        about = {
            "architecture": architecture(self.backbone),
            "parameters": sum(p.numel() for p in self.parameters()),
            "input_size": self.input_size,
            "class_names": self.class_names,
            "num_classes": self.num_classes,
            "sgld": asdict(self.sgld),
            "provenance": self.provenance,
        }
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, replay_buffer=replay_buffer)
            return publish(
                folder,
                repo_id,
                about=about,
                pictures=pictures or {},
                commit_message=commit_message,
                private=private,
                token=token,
                branch=branch,
                create_pr=create_pr,
                overwrite_card=overwrite_card,
            )

    def _check_x(self, x: Tensor) -> None:
        check_model_input(x, self.input_size, fixed_size=self.fixed_input_size, dtype=self.dtype, denormalize=self.denormalize)

    def _check_y(self, y: Tensor, n: int, device: torch.device) -> Tensor:
        return check_labels(y, n, self.num_classes, device)


def _drop_backbone_prefix(module: nn.Module, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    for key in [key for key in state_dict if key.startswith(f"{prefix}backbone.")]:
        state_dict[prefix + key[len(prefix) + len("backbone.") :]] = state_dict.pop(key)


def _add_backbone_prefix(module: nn.Module, state_dict: dict, prefix: str, *args) -> None:
    for key in [key for key in state_dict if key.startswith(prefix)]:
        state_dict[f"{prefix}backbone.{key[len(prefix) :]}"] = state_dict.pop(key)
