"""Image files as 8-bit pixels: one decoder for what is trained, evaluated and predicted on."""

import errno
import io
import os
import stat
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import ExifTags, ImageOps, UnidentifiedImageError
from PIL import Image as PILImage
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from timm_jem.errors import InputError, one_line

__all__ = [
    "MODES",
    "UNREADABLE",
    "BrokenImage",
    "Fit",
    "as_channels",
    "check_file",
    "covering",
    "decode",
    "fitted",
    "open_image",
    "open_lazily",
    "upright",
]

# What Pillow's decoders raise for files that aren't what they say.
UNREADABLE = (
    *(OSError, SyntaxError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError, EOFError),
    *(RuntimeError, struct.error, zlib.error, PILImage.DecompressionBombError),
)
MODES = {1: "L", 3: "RGB"}  # by the number of channels
_MOST_PIXELS = 2**26  # of an image that was enlarged: 200 MB
_MOST_BYTES = 2**28  # of a file on the Hub


class BrokenImage(InputError):
    """An image that can't be used; ``what`` names it.

    It can be made of a message alone, since PyTorch does so with what a loader's process raised.
    """

    def __init__(self, message: str, what: str = "") -> None:
        super().__init__(message)
        self.what = what


def fitted(image: PILImage.Image, channels: int, size: tuple[int, int], what: str) -> Tensor:
    """An image as 8-bit pixels of shape (C, H, W); one of another size is resized to cover it, and centre-cropped.

    Raises:
        BrokenImage: colours that can't be converted, or a shape that can't be enlarged so far.
    """
    pixels = tvf.pil_to_tensor(as_channels(image, channels, what))
    if pixels.shape[1:] != size:
        pixels = tvf.center_crop(tvf.resize(pixels, covering(pixels.shape[1:], size, what), antialias=True), list(size))
    return pixels


# How an upright image of 8 bits a channel becomes pixels: image, channels, (H, W) and its name for messages, as of fitted.
Fit = Callable[[PILImage.Image, int, tuple[int, int], str], Tensor]


def decode(stored: dict | None, channels: int, size: tuple[int, int], what: str, fit: Fit = fitted) -> Tensor:
    """Decode an undecoded image cell of ``datasets`` to 8-bit pixels of shape (C, H, W), as ``fit`` makes them.

    Raises:
        BrokenImage: as :func:`open_image` and ``fit``.
    """
    return fit(open_image(stored, what), channels, size, what)


def covering(old: tuple[int, int], size: tuple[int, int], what: str) -> list[int]:
    """The (H, W) of an image of ``old`` (H, W) that is resized, in its own shape, until it covers ``size``.

    Raises:
        BrokenImage: so long a strip would fill the memory.
    """
    scale = max(side / before for side, before in zip(size, old, strict=True))
    height, width = (max(side, round(scale * before)) for side, before in zip(size, old, strict=True))
    if height * width > max(_MOST_PIXELS, old[0] * old[1]):
        raise BrokenImage(
            f"{what} has an image of {old[0]:,}×{old[1]:,}, which would be enlarged to {height:,}×{width:,}: crop it", what
        )
    return [height, width]


def as_channels(image: PILImage.Image, channels: int, what: str) -> PILImage.Image:
    """An image of 8 bits as grey or RGB; transparency is dropped.

    Raises:
        BrokenImage: colours that can't be converted.
    """
    try:
        return image.convert(MODES[channels])
    except UNREADABLE as error:
        raise BrokenImage(f"{what} has colours that can't be converted ({one_line(error)}): save it as RGB", what) from error


def open_image(stored: dict | None, what: str) -> PILImage.Image:
    """Decode an undecoded image cell of ``datasets``, upright, to 8 bits a channel; of several frames the first.

    Raises:
        BrokenImage: no image there, or not one that can be decoded.
    """
    if stored is None or (stored["bytes"] is None and stored["path"] is None):
        raise BrokenImage(f"{what} has no image: remove the row", what)
    try:
        opened = open_lazily(stored)
    except UNREADABLE as error:
        raise _broken(error, what) from error
    with opened:
        return upright(opened, what)


def upright(image: PILImage.Image, what: str) -> PILImage.Image:
    """An image, decoded, as its EXIF tag turns it, with 8 bits a channel: another one, where that changes something.

    Raises:
        BrokenImage: one that can't be decoded, or has no known range.
    """
    try:
        if image.format == "EPS":
            raise SyntaxError("PostScript is a program, and none is run")
        image.load()
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
    except UNREADABLE as error:
        raise _broken(error, what) from error
    if 0 in image.size:
        raise BrokenImage(f"{what} has an image of size {image.size}: repair or remove it", what)
    if has_16_bits(image):
        return PILImage.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise BrokenImage(f"{what} has an image of 32-bit numbers, whose range is unknown: convert it to 8 or 16 bits", what)
    return image


def has_16_bits(image: PILImage.Image) -> bool:
    """Whether it is grey of 16 bits."""
    return image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM")  # whose range Pillow makes that


def open_lazily(stored: dict) -> PILImage.Image:
    """An undecoded image cell of ``datasets``, of which no more is read than its header, unless it is a file on the Hub.

    Raises one of ``UNREADABLE``, where it is no image.
    """
    path = stored["path"]
    if stored["bytes"] is not None:
        return PILImage.open(io.BytesIO(stored["bytes"]))
    if "://" in path:
        return PILImage.open(io.BytesIO(_fetched(path)))
    check_file(path)
    return PILImage.open(path)


def check_file(path: str) -> None:
    """Raise an OSError where ``path`` is no ordinary file: to open a pipe would be to wait for its writer."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a file", path)


def _fetched(address: str) -> bytes:
    """A file on the Hub, which may lie in an archive there; other addresses are nobody's to choose."""
    if not address.split("::")[-1].startswith("hf://"):
        raise OSError(errno.EINVAL, "no file here and none on the Hub: store the image's bytes", address)
    from datasets.utils.file_utils import xopen  # a second to import, for those who train

    with xopen(address, "rb") as file:
        if len(content := file.read(_MOST_BYTES + 1)) > _MOST_BYTES:
            raise OSError(errno.EFBIG, f"larger than {_MOST_BYTES >> 20} MiB", address)
    return content


def _broken(error: BaseException, what: str) -> BrokenImage:
    reason = getattr(error, "strerror", None) or one_line(error)
    reason = "no known format" if isinstance(error, UnidentifiedImageError) else reason
    return BrokenImage(f"{what} has an image that can't be decoded ({reason}): repair or remove it", what)
