"""What every joint-training loop needs."""

from timm_jem.training.batches import Batches
from timm_jem.training.checkpoints import Checkpoints, damage, rank_files
from timm_jem.training.guard import DivergenceGuard, GuardConfig, Remedy
from timm_jem.training.learner import Batch, Learner, refuse_unsupported
from timm_jem.training.state import load_tree, save_tree
from timm_jem.training.step import joint_step

__all__ = [
    "Batch",
    "Batches",
    "Checkpoints",
    "DivergenceGuard",
    "GuardConfig",
    "Learner",
    "Remedy",
    "damage",
    "joint_step",
    "load_tree",
    "rank_files",
    "refuse_unsupported",
    "save_tree",
]
