"""Which images a run has trained, chosen and reported on: a few digests that tell whether they are the same elsewhere."""

import contextlib
import hashlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import ExifTags
from PIL import Image as PILImage

from timm_jem.data.images import ImageSet, evenly, stored_bytes
from timm_jem.data.splits import Splits
from timm_jem.decoding import UNREADABLE

__all__ = ["changed_data", "data_identity", "same_held_out"]

_SAMPLE = 64  # images of a split
_SMALL = 2**16  # bytes of a file whose pixels are worth decoding


def data_identity(splits: Splits) -> dict[str, Any]:
    """What tells these splits from others, as JSON data: shape and names of classes, and for each split how many images it
    has, and digests of their labels, of their rows' numbers and of 64 images evenly spaced.

    Where the data lie, and how they are kept, doesn't count, nor whether broken images are left out. Of a stream only the
    held-out images can be known.
    """
    found: dict[str, Any] = {"image_shape": list(splits.image_shape), "classes": len(splits.class_names)}
    found["class_names"] = _digest("\0".join(splits.class_names).encode())
    for name in ("train", "val", "test"):
        images = getattr(splits, name)
        found[name] = _of_images(images) if isinstance(images, ImageSet) else None
    return found


def changed_data(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """How the data of ``now`` differ from those that were ``saved``, in words; None: they are the same."""
    for name, what in (("image_shape", "images of shape"), ("classes", "classes:")):
        if saved[name] != now[name]:
            return f"{what} {now[name]} now and {saved[name]} then"
    if saved["class_names"] != now["class_names"]:
        return "classes of other names, or in another order"
    for split in ("train", "val", "test"):
        old, new = saved[split], now[split]
        if old == new:
            continue
        if old is None or new is None:
            return "a stream on one side only"
        if old["images"] != new["images"]:
            return f"{new['images']} images in the {split} split now and {old['images']} then"
        return f"the {split} split has other {next(part for part in ('labels', 'rows', 'sample') if old[part] != new[part])}"
    return None


def same_held_out(saved: Mapping[str, Any], now: Mapping[str, Any], splits: Sequence[str] = ("val", "test")) -> bool:
    """Whether validation and test images are the very ones that were held out then, wherever they lie."""
    return all(saved.get(key) == now[key] for key in ("image_shape", "class_names", *splits))


def _of_images(images: ImageSet) -> dict[str, Any]:
    images = images if images.whole is None else images.whole
    rows = evenly(len(images), _SAMPLE)
    numbers = np.concatenate([np.asarray(numbers, dtype="<i8") for _, numbers in images.parts])
    return {
        "images": len(images),
        "labels": _digest(images.labels.numpy().astype("<i8").tobytes()),
        "rows": _digest(numbers.tobytes()),
        "sample": _digest(b"".join(_content(images.data[row][images.image_column]) for row in rows)),
    }


def _content(stored: Mapping[str, Any] | None) -> bytes:
    """A digest of an undecoded cell. Small PNGs count by their pixels: what is no file yet is encoded by whatever version of
    Pillow there is. Other files count by their bytes, since pixels depend on their decoder."""
    data = stored_bytes(stored)
    if data is None:
        data = str((stored or {}).get("path")).encode()  # a file on the Hub, or none
    elif data.startswith(b"\x89PNG") and len(data) <= _SMALL:
        with contextlib.suppress(UNREADABLE), PILImage.open(io.BytesIO(data)) as image:  # broken ones are named when decoded
            data = f"{image.mode} {image.size} ".encode() + image.tobytes() + _beside_pixels(image)
    return hashlib.blake2b(data, digest_size=16).digest()


def _beside_pixels(image: PILImage.Image) -> bytes:
    """What of a PNG makes other pixels of those that it stores; of most nothing."""
    palette, transparent = image.getpalette("RGB") if image.mode == "P" else None, image.info.get("transparency")
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    told = [value for value, usual in ((palette, None), (transparent, None), (orientation, 1)) if value != usual]
    return repr(told).encode() if told else b""


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
