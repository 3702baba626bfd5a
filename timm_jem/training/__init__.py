"""What every joint-training loop needs."""

from timm_jem.training.step import joint_step

__all__ = ["joint_step"]
