"""The checkpoints that the authors of this family of methods released, as joint energy models on timm's networks."""

from timm_jem.conversion.checkpoint import read_checkpoint
from timm_jem.conversion.methods import METHODS
from timm_jem.conversion.released import Conversion, convert

__all__ = ["METHODS", "Conversion", "convert", "read_checkpoint"]
