"""Features in which samples are compared with real images. Every distance is one of a named extractor."""

import hashlib
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from timm_jem.errors import InputError, check_whole, importing, one_line, quoted
from timm_jem.evaluation.generation import pyramid, thumbnails
from timm_jem.evaluation.labelled import eight_bit_images
from timm_jem.files import fingerprint
from timm_jem.model import JEM
from timm_jem.models.names import BUILD_ERRORS, check_name
from timm_jem.modes import frozen
from timm_jem.ood.views import check_features, view
from timm_jem.pixels import to_pixels
from timm_jem.progress import tqdm

__all__ = ["Extractor", "classifier_extractor", "extract", "load_extractor", "load_extractors", "weights_of"]

# Covariances of more dimensions than a few thousand can't be estimated from as many images as there are.
_MAX_PIXELS = 3072
_KINDS = "give pixels, thumbnails, pyramid, inception, inception:FILE or timm:NAME"


@dataclass(frozen=True)
class Extractor:
    """What makes features of images.

    Attributes:
        name: what it is: it stands beside every number.
        weights: their digest, for those that could be others under the same name; None: there are none such.
        features: from 8-bit images, uint8, shape (B, C, H, W), to (B, D).
        logits: from the same to the logits of a classifier, for Inception scores, or None.
    """

    name: str
    features: Callable[[Tensor], Tensor]
    logits: Callable[[Tensor], Tensor] | None = None
    weights: str | None = None


def load_extractor(spec: str, *, input_size: tuple[int, int, int], device: torch.device | str = "cpu") -> Extractor:
    """The extractor that ``spec`` names.

    Args:
        spec: "pixels": the pixels themselves in [-1, 1], for images of 3,072 numbers at most. "thumbnails": pixels averaged
            to 8×8. "pyramid": these and the strength of finer detail, which sees noise and blur. "inception": FID's network
            (Heusel et al., NeurIPS 2017), as torch-fidelity has it, downloaded; "inception:FILE": its weights in a .pth or
            .safetensors file. "timm:NAME": the pooled features of a pretrained timm model, on images resized (bicubic,
            antialiased) and normalised as it was trained; a NAME of "local-dir:FOLDER" or "hf-hub:REPOSITORY" is as timm
            takes it.
        input_size: (C, H, W) of the images. Grey ones are repeated to three channels.
        device: where it runs.

    Raises:
        InputError: an unknown spec, images too large for pixels or of other channels than the network's, weights that
            can't be had or are another network's; torch-fidelity is missing.
    """
    if not isinstance(spec, str):
        raise InputError(f"extractor is {quoted(spec)}: {_KINDS}")
    kind, _, rest = spec.partition(":")
    if spec == "pixels":
        dimensions = math.prod(input_size)
        if dimensions > _MAX_PIXELS:
            raise InputError(f"pixels of {input_size} are {dimensions} dimensions, too many for a covariance: use thumbnails")
        return Extractor(f"raw pixels ({dimensions} dimensions)", lambda images: to_pixels(images).flatten(1))
    if spec == "thumbnails":
        height, width = (min(side, 8) for side in input_size[1:])
        name = f"{height}×{width} thumbnails ({input_size[0] * height * width} dimensions)"
        return Extractor(name, lambda images: thumbnails(to_pixels(images)))
    if spec == "pyramid":
        dimensions = pyramid(torch.zeros(1, *input_size)).shape[1]
        height, width = (min(side, 8) for side in input_size[1:])
        name = f"{height}×{width} thumbnails and the strength of finer detail ({dimensions} dimensions)"
        return Extractor(name, lambda images: pyramid(to_pixels(images)))
    if spec == "inception" or (kind == "inception" and rest):
        _check_channels(spec, input_size[0], 3)
        network, name, weights = _inception(Path(rest) if rest else None)
        network.to(device)

        def run(images: Tensor, part: int) -> Tensor:
            return network(images.expand(-1, 3, -1, -1).to(device))[part]

        return Extractor(name, lambda images: run(images, 0), lambda images: run(images, 1), weights)
    if kind == "timm" and rest:
        model = _timm_model(rest).to(device)
        config = resolve_model_data_config(model)
        channels, *size = config["input_size"]
        _check_channels(spec, input_size[0], channels)
        mean, std = (torch.tensor(config[key], device=device)[:, None, None] for key in ("mean", "std"))

        def features(images: Tensor) -> Tensor:
            x = images.to(device).float().div(255).expand(-1, channels, -1, -1)
            if list(x.shape[2:]) != size:
                x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 1)
            return model((x - mean) / std)

        source, _, place = rest.partition(":")
        shown = f"{source}:{Path(place).name}" if source == "local-dir" else rest  # its folder is nobody's business
        return Extractor(f"timm {shown}", features, weights=fingerprint(model.state_dict()))
    raise InputError(f"extractor is {quoted(spec)}: {_KINDS}")


def load_extractors(
    specs: Sequence[str], *, input_size: tuple[int, int, int], device: torch.device | str = "cpu"
) -> list[Extractor]:
    """As :func:`load_extractor`, for several; "auto" is pixels for images of up to 192 numbers, and thumbnails above. One
    that is asked for twice is there once.

    Raises:
        InputError: no specs, or as :func:`load_extractor`.
    """
    if not specs:
        raise InputError("extractors is empty: give auto, pixels, thumbnails, pyramid, inception or timm:NAME")
    auto = "pixels" if math.prod(input_size) <= 192 else "thumbnails"
    specs = dict.fromkeys(auto if spec == "auto" else spec for spec in specs)
    return [load_extractor(spec, input_size=input_size, device=device) for spec in specs]


def weights_of(spec: str) -> str | None:
    """What :attr:`Extractor.weights` is of the extractor that ``spec`` names; None also where it can't be had any more."""
    kind, _, rest = spec.partition(":")
    try:
        if kind == "timm" and rest:
            return fingerprint(_timm_model(rest).state_dict())
        if kind == "inception" and rest:
            return _inception(Path(rest))[2]
    except InputError:  # it is missed only where something is to be measured
        pass
    return None


def _timm_model(name: str) -> nn.Module:
    check_name(name)
    try:
        return timm.create_model(name, pretrained=True, num_classes=0).eval().requires_grad_(False)
    except BUILD_ERRORS as error:
        raise InputError(f"extractor timm:{name} can't be loaded ({one_line(error)}): give a pretrained timm model") from error


def _check_channels(spec: str, channels: int, wanted: int) -> None:
    if channels not in (1, wanted):
        raise InputError(f"extractor {spec} reads {wanted} channels, and the images have {channels}: use thumbnails")


def classifier_extractor(jem: JEM, name: str) -> Extractor:
    """The features before the head of a classifier of the same images, pooled, and its logits; in eval mode.

    Raises:
        InputError: a backbone without timm's ``forward_features`` and ``forward_head``.
    """
    check_features(jem)

    def features(images: Tensor) -> Tensor:
        return view(jem, jem.normalize(to_pixels(images.to(jem.device))), features=True).features

    def logits(images: Tensor) -> Tensor:
        with frozen(jem):
            return jem(jem.normalize(to_pixels(images.to(jem.device))))

    return Extractor(name, features, logits)


@torch.no_grad()
def extract(extractor: Extractor, images: Tensor, *, batch_size: int = 256, desc: str = "features") -> Tensor:
    """Features of 8-bit images, uint8, shape (N, C, H, W): float64, shape (N, D), on the CPU.

    Raises:
        InputError: images that are not 8-bit.
    """
    check_whole("batch_size", batch_size, 1)
    eight_bit_images(images, "images to extract features of")
    return torch.cat([extractor.features(x).double().cpu() for x in tqdm(images.split(batch_size), desc=desc, leave=False)])


def _inception(file: Path | None) -> tuple[nn.Module, str, str | None]:
    """FID's Inception, its name, and a digest of weights that are not the published ones.

    Its library would unpickle the file; here it gets only tensors that were read safely.
    """
    with importing("torch-fidelity", "FID's Inception", "eval"):
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
    published = URL_INCEPTION_V3.rsplit("/", 1)[1]
    sha256 = Path(published).stem.rsplit("-", 1)[1]  # its first digits
    if file is None:
        file = Path(torch.hub.get_dir()) / "checkpoints" / published
        if not file.is_file():
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(URL_INCEPTION_V3, str(file), hash_prefix=sha256)
            except (OSError, RuntimeError) as error:
                raise InputError(
                    f"FID's Inception can't be downloaded ({one_line(error)}): get {URL_INCEPTION_V3}, and give inception:FILE"
                ) from error
    if not file.is_file():
        raise InputError(f"there is no file {file}: give FID's Inception as inception:FILE")
    try:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        weights = load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken file makes a reader raise
        raise InputError(
            f"{file} is not a file of weights ({one_line(error)}): give FID's Inception, {URL_INCEPTION_V3}"
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise InputError(f"{file} is not FID's Inception: it holds no state dict, so give {URL_INCEPTION_V3}")
    with tempfile.TemporaryDirectory() as folder:
        safe = Path(folder) / "weights.pth"
        torch.save(dict(weights), safe)
        try:
            network = FeatureExtractorInceptionV3(
                "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(safe)
            )
        except RuntimeError as error:
            raise InputError(
                f"{file} is not FID's Inception, but another network's weights (timm's and torchvision's inception_v3 are "
                f"others): give {URL_INCEPTION_V3}; {one_line(error)}"
            ) from error
    name = "FID's Inception (2048 dimensions)"
    # The same network with other weights would fit as well, and only the published file can be told from it.
    if digest.startswith(sha256):
        return network, name, None
    return network, f"{name} with the unchecked weights of {file.name}", digest
