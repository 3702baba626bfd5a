"""JEM: a timm classifier seen as an energy-based model."""

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn

from timm_jem import changes
from timm_jem.backbone import architecture, normalisation, parameter_groups
from timm_jem.energy import energy
from timm_jem.errors import InputError, check_whole, one_line, quoted
from timm_jem.gaussians import ClassGaussians
from timm_jem.hub.folder import write_folder
from timm_jem.hub.publish import of_these_weights, publish
from timm_jem.hub.published_chains import PublishedChains
from timm_jem.inputs import (
    as_labels,
    check_drawing,
    check_labels,
    check_model_input,
    checked_names,
    how_many,
    is_floats,
    kind,
)
from timm_jem.modes import forget_passes, frozen
from timm_jem.noise import Generators, chain_generators, draw_seeds, uniform_noise
from timm_jem.prediction import Prediction, Predictor, imagenet_names
from timm_jem.preprocessing import preprocessing_of
from timm_jem.reference import Reference, fit
from timm_jem.sampling import MOST_STEPS, SGLDConfig, sgld

__all__ = ["JEM"]


class JEM(nn.Module):
    """The joint energy model of a classifier: p(x, y) ∝ exp f(x)[y] (JEM, arXiv 1912.03263).

    Every method takes and returns *model input* (normalised by the backbone's mean and std), shape (B, C, H, W).
    Chains, noise and step sizes live in *pixels* in [-1, 1]; :meth:`normalize` and :meth:`denormalize` go between.
    It is an ordinary module whose only part is ``backbone``: what timm reads and writes is ``jem.backbone.state_dict()``.
    Build it with :func:`timm_jem.wrap` or :func:`timm_jem.create_model`, load it with :func:`timm_jem.from_pretrained`.

    Args:
        backbone: maps model input to logits, shape (B, num_classes); has an attribute ``num_classes`` > 0.
        data_config: timm's data configuration: ``input_size`` (C, H, W), ``mean``, ``std`` ([0, 1] pixel units), and
            what else timm keeps there.
        class_names: names of the classes in order, or None.
        sgld: how chains move; the defaults of :meth:`sample`.
        provenance: what the model was trained on and how; JSON data, kept with it.
        fixed_input_size: whether the backbone takes images of that size only.

    Raises:
        InputError: settings that are no such thing, or a backbone built in inference mode, which has no gradients.
    """

    # TorchScript compiles what it finds; of this class that is forward alone.
    __jit_unused_properties__ = (
        "chains",
        "device",
        "dtype",
        "input_size",
        "mean",
        "num_classes",
        "pretrained_cfg",
        "starts",
        "std",
    )

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
        if not isinstance(backbone, nn.Module):
            raise InputError(f"the backbone is a {type(backbone).__name__}: give a torch.nn.Module")
        check_whole("num_classes of the backbone", getattr(backbone, "num_classes", None), 1)
        if not isinstance(data_config, Mapping):
            raise InputError(
                f"data_config is a {type(data_config).__name__}: give timm's, a dict with input_size, mean and std"
            )
        self.backbone = backbone
        self.data_config, self.class_names = dict(data_config), class_names
        self.sgld, self.provenance, self.fixed_input_size = sgld, provenance, fixed_input_size
        self.reference: Reference | None = None  # held-out images, by fit_reference; saved with the model
        self._check_settings()
        self._chains: PublishedChains | None = None
        self._starts: ClassGaussians | None = None
        if any(parameter.is_inference() for parameter in backbone.parameters()):
            raise InputError("this backbone was built in torch.inference_mode and has no gradients: build it outside")
        self._mean_std_of: tuple | None = None
        self._normalisation()
        forget_passes(backbone)

    def _check_settings(self) -> None:
        """All attributes are open to change, so that they are checked, and made plain, again when the model is saved."""
        if not isinstance(self.sgld, SGLDConfig):
            raise InputError(f"sgld is a {type(self.sgld).__name__}: give a timm_jem.SGLDConfig")
        self.class_names = checked_names(self.class_names, self.num_classes)
        if not (self.provenance is None or isinstance(self.provenance, Mapping)):
            raise InputError(f"provenance is a {type(self.provenance).__name__}: give a dict of JSON data")
        self.provenance = dict(self.provenance or {})
        if not (self.reference is None or isinstance(self.reference, Reference)):
            raise InputError(f"reference is a {type(self.reference).__name__}: call fit_reference, or set it to None")
        if self.reference is not None:
            self.reference.check_fit(self.num_classes)
        size = self.data_config.get("input_size")
        if not isinstance(size, (tuple, list)) or len(size) != 3:
            raise InputError(f"input_size is {quoted(size)}: give (C, H, W)")
        for side in size:
            check_whole("input_size", side, 1)
        self._make_lists()

    def _make_lists(self) -> None:
        """Of arrays and tensors, which neither timm nor JSON takes for a mean or a standard deviation."""
        for name in ("mean", "std"):
            if hasattr(told := self.data_config.get(name), "tolist"):
                self.data_config[name] = told.tolist()

    def _normalisation(self) -> tuple[Tensor, Tensor]:
        self._make_lists()
        # No buffers: half precision would round those, and what loads weights without memory would lose them.
        device, dtype = self.device, torch.promote_types(self.dtype, torch.float32)
        told = [self.data_config.get(name) for name in ("mean", "std", "input_size")]
        key = (device, dtype, *(tuple(value) if isinstance(value, (list, tuple)) else value for value in told))
        if self._mean_std_of != key:
            made = normalisation(self.data_config, device, dtype)
            if any(type(tensor) is not Tensor for tensor in made):  # fake ones, which must not stay
                return made
            self._mean_std, self._mean_std_of = made, key
        return self._mean_std

    def _normalisation_of(self, images: Tensor) -> tuple[Tensor, Tensor]:
        channels = self.input_size[0]
        if images.ndim > 2 and images.shape[-3] != channels:  # one channel would become all of them
            raise InputError(f"images have shape {tuple(images.shape)}: give {channels} channels, {('B', *self.input_size)}")
        mean, std = self._normalisation()
        return mean.to(images.device), std.to(images.device)

    @property
    def mean(self) -> Tensor:
        """Of the backbone's input, [0, 1] pixel units, shape (1, C, 1, 1), on the weights' device."""
        return self._normalisation()[0]

    @property
    def std(self) -> Tensor:
        """Of the backbone's input, [0, 1] pixel units, shape (1, C, 1, 1), on the weights' device."""
        return self._normalisation()[1]

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights, and so of model input."""
        return next((p.dtype for p in self.backbone.parameters() if p.is_floating_point()), torch.float32)

    @property
    def device(self) -> torch.device:
        """That of the weights; the CPU where there are none, as on the meta device and where they are offloaded."""
        return next((p.device for p in self.backbone.parameters() if not p.is_meta), torch.device("cpu"))

    @property
    def num_classes(self) -> int:
        return self.backbone.num_classes

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(C, H, W) of the images this model is for, and of those that :meth:`sample` makes."""
        return tuple(self.data_config["input_size"])

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """What ``timm.data.resolve_model_data_config(jem)`` reads: ``data_config``, and what else is true of this model."""
        return {"num_classes": self.num_classes, "fixed_input_size": self.fixed_input_size, **self.data_config}

    def forward(self, x: Tensor) -> Tensor:
        """Logits f(x), shape (B, num_classes): the backbone's own, bit for bit."""
        return self.backbone(x)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False):
        """As of any module.

        Raises:
            InputError: a state dict of the backbone alone, as timm's are.
        """
        names = set(state_dict) if isinstance(state_dict, Mapping) else set()
        if names & set(self.backbone.state_dict()) and not names & set(self.state_dict()):
            raise InputError("this is a state dict of the backbone alone: use jem.backbone.load_state_dict")
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The backbone's, for ``timm.optim.create_optimizer_v2``: parameters that no weight decay is for."""
        names = getattr(self.backbone, "no_weight_decay", set)()
        return {f"{compiled}backbone.{name}" for name in names for compiled in ("", "_orig_mod.")}  # torch.compile's prefix

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """The backbone's, for ``timm.optim.create_optimizer_v2(..., layer_decay=...)``: a parameter's layer by its name."""
        layers = parameter_groups(self.backbone, coarse)
        return lambda name: layers[name.removeprefix("_orig_mod.").removeprefix("backbone.")]

    def normalize(self, u: Tensor) -> Tensor:
        """Pixels in [-1, 1] to model input: (u − (2·mean − 1)) / (2·std); the identity for mean = std = 0.5."""
        if not is_floats(u):
            raise InputError(f"pixels are {kind(u)}: give floating-point ones in [-1, 1], e.g. images / 127.5 - 1")
        mean, std = self._normalisation_of(u)
        return ((u - (2 * mean - 1)) / (2 * std)).to(self.dtype)

    def denormalize(self, x: Tensor) -> Tensor:
        """Model input to pixels in [-1, 1]: the inverse of :meth:`normalize`."""
        if not is_floats(x):
            raise InputError(f"x is {kind(x)}: give floating-point model input")
        mean, std = self._normalisation_of(x)
        return x * (2 * std) + (2 * mean - 1)

    def energy(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """E(x) = −logsumexp f(x), or E(x, y) = −f(x)[y]; shape (B,). Lower energy = likelier.

        Args:
            x: model input, floating point, shape (B, C, H, W), on the model's device.
            y: class labels, integers, shape (B,).

        Raises:
            InputError: ``x`` of wrong shape, dtype, device or range, or ``y`` of wrong shape, dtype or range.
        """
        y = self._checked(x, y)
        if not torch.compiler.is_compiling() and x.is_inference() and torch.is_grad_enabled():
            x = x.clone()  # gradients pass through the weights, and so through what meets them
        return energy(self._logits(x), y)

    def log_density(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """log p(x), or log p(x, y), up to the constant −log Z: −energy(x, y). Shapes and errors as there."""
        return -self.energy(x, y)

    def score(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """∇ₓ log p(x), or ∇ₓ log p(x, y), with respect to model input; shape of ``x``, detached.

        Works under ``no_grad``, leaves parameters without gradients, and is that of :meth:`energy` in the module's
        present train or eval mode, where a forward in train mode moves BatchNorm statistics. Under ``torch.func.vmap`` take
        ``torch.func.grad`` of :meth:`log_density` instead. Errors as :meth:`energy`.
        """
        y = self._checked(x, y)
        with torch.inference_mode(False), torch.enable_grad():
            x = x.detach().clone().requires_grad_(True)
            return -torch.autograd.grad(energy(self._logits(x), y).sum(), x)[0]

    def pixel_energy(self, u: Tensor, y: Tensor | None = None) -> Tensor:
        """The energy of pixels in [-1, 1], shape (B, C, H, W), whatever their values: what chains descend; shape (B,).

        In the mode that the model is in: for chains of your own call ``eval()`` before, as :meth:`sample` does for its own.

        Raises:
            InputError: pixels of another shape, type or device, or labels that are not int64, shape (B,).
        """
        if is_floats(u) and (
            (u.ndim != 4 or u.shape[1] != self.input_size[0] or 0 in u.shape[2:])
            or (self.fixed_input_size and u.shape[1:] != self.input_size)
        ):
            raise InputError(f"pixels have shape {tuple(u.shape)}: give {('B', *self.input_size)}")
        return energy(self._logits(self.normalize(u)), y)

    def _logits(self, x: Tensor) -> Tensor:
        # accelerate's hooks move x themselves, and FSDP keeps offloaded weights on the CPU.
        moving = (hasattr(part, "_hf_hook") or hasattr(part, "reshard") for part in self.modules())
        held = any(not parameter.is_meta for parameter in self.parameters())
        if held and x.device != self.device and not any(moving):
            raise InputError(f"x is on {x.device} and the model on {self.device}: give x.to(jem.device)")
        logits = self(x)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise InputError(
                f"the backbone gives {kind(logits)} instead of logits (B, {self.num_classes}): build it with pooling and one "
                "head, and call set_distilled_training(False) on a distilled one"
            )
        return logits

    def fit_reference(
        self,
        x: Tensor | Iterable[Tensor | tuple[Tensor, Tensor]],
        y: Tensor | list[int] | None = None,
        *,
        accept: float = 0.95,
        batch_size: int = 256,
    ) -> Reference:
        """Learn from held-out images how sure the model may be and which energies are ordinary; kept, and saved, with it.

        It is of the weights as they are: where they are trained further, fit it again.

        Args:
            x: model input, shape (N, C, H, W), or batches of that, or of (x, y), as a DataLoader gives them.
            y: labels, integers, shape (N,), for the temperature; of batches each has its own. None: no temperature. There is
                none either where the images can't tell it, as a few can't, or some that the network is all right about.
            accept: share of these images that are no outliers.
            batch_size: images through the network at once; batches that are given are taken as they are.

        Returns:
            What is now ``jem.reference``.

        Raises:
            InputError: no model input, labels that don't fit, or no images.
        """
        options = {"num_classes": self.num_classes, "accept": accept, "batch_size": batch_size}
        self.reference = fit(self._classified, x, y, **options)
        return self.reference

    def predict(self, images: Any, *, batch_size: int = 64) -> Prediction | list[Prediction]:
        """Label, probability, energy, and how unusual that is, of images as people have them.

        Files and 8-bit images are turned upright by their EXIF tag, made grey or RGB as the model is, transparency dropped,
        and resized as :func:`timm_jem.preprocessing.preprocessing_of` says.

        Args:
            images: the name of a file, a PIL image, a uint8 array of numpy, (H, W) or (H, W, C), a uint8 tensor (C, H, W), or
                model input, a floating-point tensor (C, H, W), which is taken as it is; or a list of those; or a batch of
                one of the last three, (N, H, W, C) or (N, C, H, W): grey arrays (H, W) go as a list.
            batch_size: images through the network at once.

        Returns:
            One prediction for one image, a list of them for a list or a batch. Without :meth:`fit_reference`
            probabilities are the network's own, and nothing is said of outliers.

        Raises:
            InputError: none of these, a file that can't be decoded, or values that are no model input.
        """
        return self.predictor().predict(images, batch_size=batch_size)

    def model_input(self, images: Any) -> Tensor:
        """Images, as :meth:`predict` takes them, as model input, shape (B, C, H, W), on the model's device; errors as there."""
        x = self.predictor().model_input(images)
        self._check_x(x)
        return x.to(self.device)

    def predictor(self) -> Predictor:
        """What predicts as the model is now, also a stream of images."""
        self._check_settings()
        mean, std = (values.expand(1, self.input_size[0], 1, 1).flatten().tolist() for values in self._normalisation())
        see = preprocessing_of(self.data_config, self.provenance, self.normalize, mean=mean, std=std, dtype=self.dtype)
        names = self.class_names or imagenet_names(getattr(self.backbone, "pretrained_cfg", {}), self.num_classes)
        return Predictor(see, self._classified, names, self.reference)

    @torch.no_grad()
    def _classified(self, x: Tensor) -> Tensor:
        """Logits of model input in eval mode, at least float32, shape (B, num_classes), on the CPU."""
        x = x.to(self.device) if isinstance(x, Tensor) and not x.is_meta else x
        self._check_x(x)
        with frozen(self):
            logits = self._logits(x)
        return logits.cpu() if logits.dtype == torch.float64 else logits.float().cpu()

    def sample(
        self,
        n: int | None = None,
        *,
        y: Tensor | list[int] | int | None = None,
        generator: torch.Generator | None = None,
        seeds: Sequence[int] | Tensor | None = None,
        num_steps: int | None = None,
        sgld_config: SGLDConfig | None = None,
        init: Tensor | Literal["buffer", "noise"] | None = None,
        batch_size: int = 256,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Draw images by SGLD chains, in eval mode; the model and its flags are left as they were.

        Several threads may draw from one model at once. None may train it meanwhile, and ``on_step`` must leave its modes
        alone: a chain in train mode would move BatchNorm statistics.

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
            init: where chains start: model input, shape (n, C, H, W), from which they go on with noise in each step,
                ``denoise_steps`` or not; "buffer": distinct published chains; "noise": uniform
                noise; None: where those of training did, see ``starts``.
            batch_size: the most chains that go through the network at once, though never fewer than four do.
            on_step: called with (steps done, pixels) after each step.

        Returns:
            Model input, shape (n, C, H, W); ``jem.denormalize`` makes pixels of it.

        Raises:
            InputError: ``n``, ``y``, ``seeds`` and ``init`` that disagree, ``y`` or seeds out of range, ``num_steps`` < 1,
                more published chains than there are, seeds with a generator or for published chains.
        """
        self._check_weights()
        config = self._settings_of_chains(sgld_config)
        check_drawing(init, generator, seeds, batch_size, on_step)
        goes_on = isinstance(init, Tensor) or init == "buffer"
        if num_steps is None:
            num_steps = config.num_steps if goes_on else config.sample_steps or config.num_steps
        check_whole("num_steps", num_steps, 1, MOST_STEPS)
        generators = None if seeds is None else chain_generators(seeds)
        y = None if y is None else as_labels(y, self.num_classes)
        n, device = how_many(n, init, y, generators, self.input_size), self.device
        y = self._classes(y, n)
        if isinstance(init, Tensor):
            self._check_x(init)
            u = self.denormalize(init.to(device))
        elif init == "buffer":
            if (chains := self.chains) is None:
                raise InputError("this model has no published chains: leave init out, and chains start from noise")
            u, labels = chains.draw(n, y, generator)
            u, y = u.to(device), y if y is not None or labels is None else labels.to(device)
        generators = generators or chain_generators(draw_seeds(n, generator))
        if not goes_on:
            u = self.fresh(n, y=y, generator=generators, noise=init == "noise").to(device)
        options = {"num_steps": num_steps, "batch_size": batch_size, "on_step": on_step}
        options["rest_at"] = None if goes_on else self.rest_at(n, config, y=y)
        options["denoise_steps"] = 0 if isinstance(init, Tensor) else config.denoise_steps
        with frozen(self):
            return self.normalize(sgld(self.pixel_energy, u, config, y=y, generator=generators, **options))

    def rest_at(self, n: int, sgld: SGLDConfig, *, y: Tensor | None = None) -> Tensor | None:
        """The energies at which ``n`` fresh chains rest, see ``rest`` of ``sgld``; nats, shape (n,), on the model's device.

        Args:
            n: how many.
            sgld: their settings.
            y: their classes, int64, shape (n,); None: of chains of E(x).

        Raises:
            InputError: chains that rest, and no reference that knows where.
        """
        if sgld.rest is None:
            return None
        if self.reference is None:
            raise InputError("sgld.rest needs energies of held-out images: call fit_reference, or set rest to None")
        self.reference.check_fit(self.num_classes)
        return self.reference.at(sgld.rest, y).expand(n).to(self.device)

    def fresh(self, n: int, *, y: Tensor | None = None, generator: Generators = None, noise: bool = False) -> Tensor:
        """``n`` chains that have made no step, from ``starts`` or of noise, on the CPU unless ``generator`` is of a GPU.

        Args:
            n: how many.
            y: their classes, int64, shape (n,); None: of chains of E(x).
            generator: the only source of randomness, or a list of one a chain.
            noise: of noise in any case.

        Returns:
            Pixels in [-1, 1], shape (n, C, H, W), float32.
        """
        shape, starts = (n, *self.input_size), self.starts
        if starts is None or noise:
            return uniform_noise(shape, generator=generator, dtype=torch.float32)
        return starts(shape, generator=generator, y=y)

    @property
    def starts(self) -> ClassGaussians | None:
        """Where fresh chains start, which is saved with the model: the Gaussians that those of training started from; None:
        uniform noise.

        Raises:
            InputError: set or asked for, Gaussians of other images or classes than the model's.
        """
        return self._fitting("starts", self._starts, ClassGaussians)

    @starts.setter
    def starts(self, starts: ClassGaussians | None) -> None:
        self._starts = self._fitting("starts", starts, ClassGaussians)

    @property
    def chains(self) -> PublishedChains | None:
        """Published chains, which are saved with the model; None: there are none.

        Raises:
            InputError: set or asked for, chains of other images or classes than the model's.
        """
        return self._fitting("chains", self._chains, PublishedChains)

    @chains.setter
    def chains(self, chains: PublishedChains | None) -> None:
        self._chains = self._fitting("chains", chains, PublishedChains)

    counterfactual, restore = changes.counterfactual, changes.restore
    refine, adapted = changes.refine, changes.adapted

    def _settings_of_chains(self, sgld_config: SGLDConfig | None) -> SGLDConfig:
        config = self.sgld if sgld_config is None else sgld_config
        if not isinstance(config, SGLDConfig):
            raise InputError(f"sgld_config is a {type(config).__name__}: give a timm_jem.SGLDConfig")
        return config

    def _classes(self, y: Tensor | list[int] | int | None, n: int) -> Tensor | None:
        """One class a chain or image, of those given or of one for all."""
        if y is None:
            return None
        y = as_labels(y, self.num_classes)
        return check_labels(y.expand(n) if y.ndim == 0 else y, n, self.num_classes, self.device)

    def _fitting(self, name: str, value: Any, kind: type) -> Any:
        """``value``, None or of a kind that fits the model, which may have another head than when it was set."""
        if value is not None and not isinstance(value, kind):
            raise InputError(f"{name} is a {type(value).__name__}: give timm_jem.{kind.__name__}, or None")
        if value is not None:
            value.check_fit(self.input_size, self.num_classes)
        return value

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
        self._check_settings()
        if torch.get_default_dtype() not in (torch.float32, torch.float64):
            raise InputError(
                f"torch's default dtype is {torch.get_default_dtype()}, in which timm would rebuild the model to compare it: "
                "save it after torch.set_default_dtype(torch.float32)"
            )
        ours = {"sgld": asdict(self.sgld), "provenance": self.provenance}
        ours |= {} if self.reference is None else {"reference": asdict(self.reference)}
        write_folder(
            self.backbone,
            save_directory,
            ours,
            class_names=self.class_names,
            data_config=self.data_config,
            chains=self.chains if replay_buffer else None,
            starts=self.starts,
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
            pictures: files for the card to show, by their names there: "samples.png", "buffer.png" (where chains go along),
                "evaluation/reliability.png", "evaluation/ood_auroc.png", "evaluation/pgd_linf.png".
            overwrite_card: replace a README.md that someone wrote; otherwise it is kept, with a warning.

        Returns:
            The commit's URL.

        Raises:
            InputError: what :meth:`save_pretrained` refuses, before anything is sent; or what the Hub refuses.

        Warns:
            UserWarning: the provenance has results of other weights, which are left out.
        """
        try:
            with tempfile.TemporaryDirectory() as folder:
                self.save_pretrained(folder, replay_buffer=replay_buffer)
                chains = self.chains if replay_buffer else None
                about = {
                    "architecture": architecture(self.backbone),
                    "parameters": sum(p.numel() for p in self.parameters()),
                    "input_size": self.input_size,
                    "class_names": self.class_names,
                    "num_classes": self.num_classes,
                    "sgld": asdict(self.sgld),
                    "provenance": of_these_weights(self.provenance, unwrap_model(self.backbone).state_dict()),
                    "chains": 0 if chains is None else len(chains),
                    "starts": 0 if self.starts is None else len(self.starts.means),
                    "chains_have_classes": chains is not None and chains.labels is not None,
                }
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
        except OSError as error:
            raise InputError(
                f"what is pushed can't be written to a temporary folder ({one_line(error)}): make room, or set TMPDIR"
            ) from error

    def _check_weights(self) -> None:
        first = next(self.backbone.parameters(), None)
        offloaded = hasattr(self, "_hf_hook")  # accelerate's, which brings weights when they are needed
        if first is not None and first.is_meta and not offloaded:
            raise InputError("this model is on the meta device and has no weights: load them first")

    def _check_x(self, x: Tensor) -> None:
        if not (isinstance(x, Tensor) and x.is_meta):
            self._check_weights()
        elif any(not p.is_meta for p in self.backbone.parameters()):
            raise InputError("x is on the meta device and the model is not: give model input that has values")
        check_model_input(x, self.input_size, fixed_size=self.fixed_input_size, dtype=self.dtype, denormalize=self.denormalize)

    def _checked(self, x: Tensor, y: Tensor | None) -> Tensor | None:
        """Labels as int64, shape (B,), where ``x``, shape (B, C, H, W), is; None: there are none."""
        self._check_x(x)
        return None if y is None else check_labels(y, x.shape[0], self.num_classes, x.device)  # torch.export would fix len(x)
