"""An image as a model takes it: the way it was trained to, or timm's."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from PIL import Image as PILImage
from timm.data import create_transform, resolve_data_config
from torch import Tensor

from timm_jem.decoding import MODES, BrokenImage, Fit, as_channels, covering, fitted
from timm_jem.errors import InputError, check_number, one_line, quoted
from timm_jem.pixels import to_pixels

__all__ = ["Preprocessing", "fit_of", "preprocessing_of", "timm_settings", "trained_here"]

# An upright image of 8 bits a channel, and its name for messages, to model input, shape (C, H, W).
Preprocessing = Callable[[PILImage.Image, str], Tensor]
_LARGEST_SIDE = 4096  # of what an image is resized to before it is cropped


def trained_here(provenance: Mapping[str, Any]) -> bool:
    """Whether a training run of this package made the model: its provenance then holds the settings of its images."""
    config = provenance.get("config")
    return isinstance(config, Mapping) and isinstance(config.get("data"), Mapping)


def preprocessing_of(
    data_config: Mapping[str, Any],
    provenance: Mapping[str, Any],
    normalize: Callable[[Tensor], Tensor],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Preprocessing:
    """How a model takes images.

    A model that a training run of this package made, by its provenance, takes them as :func:`timm_jem.decoding.fitted` made
    them for its training and evaluation; any other takes them as timm's evaluation transform does, by its data configuration
    (``crop_pct``, ``crop_mode``, ``interpolation``, ``mean``, ``std``).

    Args:
        data_config: timm's data configuration; timm's defaults stand in for what it leaves out.
        provenance: of the model.
        normalize: pixels in [-1, 1] to model input.
        mean, std: of the model's input, [0, 1] pixel units, one for each channel.
        dtype: of the model.

    Raises:
        InputError: a configuration that timm doesn't know; from what is returned, an image that can't be used, or any where the
            model's are neither grey nor RGB.
    """
    channels, *size = data_config["input_size"]
    if channels not in MODES:
        return partial(_refuse, shape=("B", channels, *size))
    if trained_here(provenance):
        return lambda image, what: normalize(to_pixels(fitted(image, channels, tuple(size), what))[None])[0]
    as_timm_does = _as_timm_does(data_config, mean=mean, std=std)
    return lambda image, what: as_timm_does(image, what).to(dtype)


def fit_of(data_config: Mapping[str, Any], provenance: Mapping[str, Any]) -> Fit:
    """How a model's images become 8-bit pixels of its size, as :func:`preprocessing_of` has them before they are normalised.

    Raises:
        InputError: a configuration that timm doesn't know.
    """
    if trained_here(provenance) or data_config["input_size"][0] not in MODES:
        return fitted
    as_timm_does = _as_timm_does(data_config, normalize=False)
    return lambda image, channels, size, what: as_timm_does(image, what)


def timm_settings(data_config: Mapping[str, Any]) -> dict[str, Any]:
    """What timm's evaluation transform goes by before it normalises; timm's defaults stand in for what is left out."""
    known = resolve_data_config(pretrained_cfg=dict(data_config))
    return {name: known[name] for name in ("crop_pct", "crop_mode", "interpolation")}


def _as_timm_does(data_config: Mapping[str, Any], **normalisation: Any) -> Preprocessing:
    channels, *size = data_config["input_size"]
    settings = timm_settings(data_config)
    check_number("crop_pct of the data configuration", settings["crop_pct"], above=0, most=10)
    resized = tuple(math.floor(side / settings["crop_pct"]) for side in size)
    if not 0 < min(resized) <= max(resized) <= _LARGEST_SIDE:
        crop_pct = quoted(settings["crop_pct"])
        raise InputError(f"crop_pct of the data configuration is {crop_pct}: images would be resized to {quoted(resized)}")
    try:
        transform = create_transform((channels, *size), **normalisation, **settings)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"timm makes no images by {quoted(settings)} ({one_line(error)}): mend the data configuration"
        ) from error

    def transformed(image: PILImage.Image, what: str) -> Tensor:
        if settings["crop_mode"] not in ("squash", "border"):  # which don't enlarge a strip until it covers the square
            covering(image.size[::-1], resized, what)
        image = as_channels(image, channels, what)
        try:
            return transform(image)
        except ValueError as error:
            raise BrokenImage(f"{what} can't be resized as timm does ({one_line(error)}): give another image", what) from error

    return transformed


def _refuse(image: PILImage.Image, what: str, shape: tuple) -> NoReturn:
    raise InputError(
        f"{what} has 1 or 3 channels, and this model takes {shape[1]}: give model input, a tensor of shape {shape}"
    )
