"""Hugging Face image data sets as splits of 8-bit images."""

from timm_jem.data.config import DataConfig
from timm_jem.data.images import ImageSet
from timm_jem.data.sources import digits
from timm_jem.data.splits import Splits, load_images, load_splits
from timm_jem.data.streamed import StreamedSet

__all__ = ["DataConfig", "ImageSet", "Splits", "StreamedSet", "digits", "load_images", "load_splits"]
