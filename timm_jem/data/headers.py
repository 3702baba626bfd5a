"""What image files say of themselves before they are decoded: the size and the colours that suit all of them."""

from dataclasses import dataclass

from datasets import Dataset, Image
from PIL import ExifTags
from PIL import Image as PILImage

from timm_jem.data.config import DataConfig
from timm_jem.data.images import evenly, located
from timm_jem.decoding import UNREADABLE, has_16_bits, open_image, open_lazily

__all__ = ["Headers", "read_headers"]

_LOOK = 500
_GREY = ("1", "L", "LA")
_LARGEST_OWN = 256  # a side; chains of larger images are no default
_LARGEST_ROUND = 64
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap the sides


@dataclass(frozen=True)
class Headers:
    """Sizes and colours of some of a data set's images.

    Attributes:
        sizes: (H, W), upright, of each.
        grey: how many have no colours.
        total: how many images the data set has.
    """

    sizes: tuple[tuple[int, int], ...]
    grey: int
    total: int

    def channels_for(self, config: DataConfig) -> int:
        """1 where all are grey, 3 where one isn't, unless ``config`` says."""
        return config.channels or (1 if self.grey == len(self.sizes) else 3)

    def size_for(self, config: DataConfig) -> tuple[int, int]:
        """The files' own (H, W) where they have one in common of at most 256 pixels a side, unless ``config`` says.

        Otherwise a square whose side most files' short side allows: a multiple of 8, where it can be, of at most 64.
        """
        if config.image_size is not None:
            return config.image_size, config.image_size
        if len(set(self.sizes)) == 1 and max(self.sizes[0]) <= _LARGEST_OWN:
            return self.sizes[0]
        side = min(_LARGEST_ROUND, sorted(min(size) for size in self.sizes)[len(self.sizes) // 2])
        return (side - side % 8 or side,) * 2

    def told(self, channels: int, size: tuple[int, int], asked: bool) -> str:
        """The files beside what is made of them, where that differs, or where not all were looked at.

        Args:
            channels, size: of what is made.
            asked: whether the size was asked for.
        """
        differs = [f"{self.grey} grey"] if self.grey and channels == 3 else []
        differs += [f"{len(self.sizes) - self.grey} in colour"] if self.grey < len(self.sizes) and channels == 1 else []
        if set(self.sizes) != {size}:
            small, large = (f"{h}×{w}" for h, w in (extreme(self.sizes, key=_area) for extreme in (min, max)))
            differs = [f"files are {small}" if small == large else f"files are {small} to {large}", *differs]
        if self.total > _LOOK:
            differs.append(f"{'of ' * bool(differs)}{len(self.sizes)} looked at")
        if set(self.sizes) != {size} and not asked:
            differs.append("--data.image_size sets another")
        shown = f"{'grey' if channels == 1 else 'RGB'} {size[0]}×{size[1]}"
        return f"{shown} ({', '.join(differs)})" if differs else shown


def read_headers(rows: Dataset, image_column: str, what: str) -> Headers:
    """Headers of at most 500 images, evenly from all ``rows``; broken ones are left to be named when they are decoded.

    Raises:
        BrokenImage: none has a header.
    """
    rows = rows.select_columns([image_column]).cast_column(image_column, Image(decode=False))
    sizes, grey = [], 0
    for row in evenly(len(rows), _LOOK):
        try:
            with open_lazily(rows[row][image_column]) as image:
                size, is_grey = _upright(image), _is_grey(image)
                sizes.append(size)
                grey += is_grey
        except UNREADABLE:
            continue
    if not sizes:
        stored = rows[0][image_column]
        open_image(stored, located(f"row 0 of {what}", stored))
    return Headers(tuple(sizes), grey, len(rows))


def _is_grey(image: PILImage.Image) -> bool:
    """By its mode, and with a palette, as GIFs of grey images have, by the palette's colours."""
    if image.mode == "P":
        palette = image.getpalette("RGB") or []  # decodes the image
        return palette[0::3] == palette[1::3] == palette[2::3]
    return image.mode in _GREY or has_16_bits(image)


def _upright(image: PILImage.Image) -> tuple[int, int]:
    # A TIFF's size is upright already; a PNG without the tag would be decoded to look for it.
    # Pillow finds one in XMP, too.
    tagged = image.format != "TIFF" and bool({"exif", "xmp", "XML:com.adobe.xmp"} & set(image.info))
    turned = tagged and image.getexif().get(ExifTags.Base.Orientation) in _TURNED
    return image.size if turned else image.size[::-1]


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]
