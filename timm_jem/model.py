"""JEM: a timm classifier seen as an energy-based model."""

import difflib
import warnings
from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.data.model_config import resolve_input_data_config
from timm.models import resolve_model_input_args
from torch import Tensor, nn

from timm_jem.energy import energy
from timm_jem.errors import InputError
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
        if class_names is not None and len(class_names) != backbone.num_classes:
            raise InputError(f"{len(class_names)} class names for {backbone.num_classes} classes: give one name a class")
        self.backbone = backbone
        self.data_config = dict(data_config)
        self.class_names = class_names
        self.sgld = sgld
        self.provenance = dict(provenance or {})
        channels = self.input_size[0]
        reference = next(backbone.parameters(), torch.empty(0))
        for name in ("mean", "std"):
            values = torch.tensor(self.data_config[name], device=reference.device, dtype=torch.float32)
            self.register_buffer(name, values.expand(channels).reshape(1, channels, 1, 1).clone(), persistent=False)
        self.register_state_dict_post_hook(_drop_backbone_prefix)
        self.register_load_state_dict_pre_hook(_add_backbone_prefix)

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
        return (u - (2 * self.mean - 1)) / (2 * self.std)

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
        return energy(self(x), y)

    def log_density(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """log p(x), or log p(x, y), up to the constant −log Z: −energy(x, y). Shapes and errors as there."""
        return -self.energy(x, y)

    def score(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """∇ₓ log p(x), or ∇ₓ log p(x, y), with respect to model input; shape of ``x``, detached.

        Works under ``no_grad``, leaves parameters without gradients, and is that of :meth:`energy` in the module's
        present train or eval mode. Errors as :meth:`energy`.
        """
        self._check_x(x)
        y = None if y is None else self._check_y(y, len(x), x.device)
        with torch.inference_mode(False), torch.enable_grad():
            x = x.detach().clone().requires_grad_(True)
            return -torch.autograd.grad(energy(self(x), y).sum(), x)[0]

    def pixel_energy(self, u: Tensor, y: Tensor | None = None) -> Tensor:
        """The energy of pixels in [-1, 1], shape (B, C, H, W), unchecked: what chains descend; shape (B,)."""
        return energy(self(self.normalize(u)), y)

    def sample(
        self,
        n: int | None = None,
        *,
        y: Tensor | list[int] | int | None = None,
        generator: torch.Generator | None = None,
        num_steps: int | None = None,
        sgld_config: SGLDConfig | None = None,
        init: Tensor | None = None,
        batch_size: int = 256,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Draw images by SGLD chains, in eval mode; the model and its flags are left as they were.

        Args:
            n: how many; may be left out where ``y`` or ``init`` tells.
            y: classes to draw, integers, shape (n,), or one for all: chains of E(x, y). None: chains of E(x).
            generator: the only source of randomness (None: PyTorch's global one). The same seed gives the same
                chains, whatever ``batch_size``.
            num_steps: length of the chains; None: what the model was trained with and found best.
            sgld_config: instead of the model's own settings.
            init: where chains start, model input, shape (n, C, H, W); None: uniform noise.
            batch_size: how many chains go through the network at once.
            on_step: called with (steps done, pixels) after each step.

        Returns:
            Model input, shape (n, C, H, W); ``jem.denormalize`` makes pixels of it.

        Raises:
            InputError: ``n`` that disagrees with ``y`` or ``init``, ``y`` out of range, ``num_steps`` < 1.
        """
        config = self.sgld if sgld_config is None else sgld_config
        if num_steps is None:
            num_steps = config.sample_steps or config.num_steps
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
            raise InputError(f"num_steps is {num_steps!r}: give a whole number of at least 1")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"batch_size is {batch_size!r}: give a whole number of at least 1")
        if n is None:
            told = [len(t) for t in (init, y) if t is not None and not isinstance(t, int) and torch.as_tensor(t).ndim]
            if not told:
                raise InputError("sample doesn't know how many images to draw: give n")
            n = told[0]
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise InputError(f"n is {n!r}: give a whole number of at least 1")
        device = self.mean.device
        if y is not None:
            y = torch.as_tensor(y, device=device)
            y = self._check_y(y.expand(n) if y.ndim == 0 else y, n, device)
        if init is None:
            u = uniform_noise((n, *self.input_size), generator=generator, device=device)
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

    def save_pretrained(self, save_directory: str) -> None:
        """Write the folder that :func:`timm_jem.from_pretrained` and plain timm read; see ``timm_jem.hub.save``."""
        from timm_jem.hub import save

        save(self, save_directory)

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
        if x.numel() and not torch.compiler.is_compiling():
            farthest = float(self.denormalize(x.detach()).abs().amax())
            if farthest > _FAR_FROM_PIXELS:
                raise InputError(
                    f"x is {farthest:.0f} in pixels, far outside [-1, 1]: give model input, "
                    "e.g. jem.normalize(images / 127.5 - 1) for images in 0..255"
                )

    def _check_y(self, y: Tensor, n: int, device: torch.device) -> Tensor:
        y = torch.as_tensor(y, device=device)
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
    except ValueError as error:
        raise InputError(f"{_name(model)}: {error}") from error
    data_config["fixed_input_size"] = bool(
        getattr(model, "_traits", {}).get("fixed_input_size", model.pretrained_cfg.get("fixed_input_size", False))
    )
    _warn_of_zero_head(model)
    if class_names is None:
        names = model.pretrained_cfg.get("label_names")
        class_names = list(names) if names and len(names) == model.num_classes else None
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
        except ValueError as error:
            raise InputError(f"{name}: {error}") from error
    try:
        backbone = timm.create_model(pretrained=pretrained, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} can't be built with these arguments: {' '.join(str(error).split())}") from error
    return wrap(backbone, input_size=input_size, class_names=class_names, sgld=sgld)


def check_name(name: str) -> None:
    """Raise an InputError with the closest names where timm knows no model of this one; sources ("hf-hub:") pass."""
    known = ":" in name or timm.is_model(name.split(".")[0])
    if not known:
        close = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() has them all"
        raise InputError(f"unknown model {name!r}: {hint}")


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
