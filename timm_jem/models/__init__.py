"""Backbones for small images; importing this package registers them with timm."""

from timm_jem.models.wrn import WideResNet

__all__ = ["WideResNet"]
