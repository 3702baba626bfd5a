"""What every joint-training loop needs; recipes/train.py is the conversation of these objects."""

from timm_jem.training.batches import Batch, Batches
from timm_jem.training.checkpoints import Checkpoints, damage, rank_files
from timm_jem.training.guard import DivergenceGuard, GuardConfig
from timm_jem.training.learner import Learner
from timm_jem.training.method import Drawn, MaximumLikelihood, Method
from timm_jem.training.parsing import parse_settings, settings_of
from timm_jem.training.plan import check_plan
from timm_jem.training.processes import open_accelerator, refuse_unsupported
from timm_jem.training.remedy import Remedy
from timm_jem.training.run import Rollback, Run
from timm_jem.training.settings import HubConfig, ModelConfig, Settings, TrainConfig
from timm_jem.training.state import load_tree, save_tree

__all__ = [
    "Batch",
    "Batches",
    "Checkpoints",
    "DivergenceGuard",
    "Drawn",
    "GuardConfig",
    "HubConfig",
    "Learner",
    "MaximumLikelihood",
    "Method",
    "ModelConfig",
    "Remedy",
    "Rollback",
    "Run",
    "Settings",
    "TrainConfig",
    "check_plan",
    "damage",
    "load_tree",
    "open_accelerator",
    "parse_settings",
    "rank_files",
    "refuse_unsupported",
    "save_tree",
    "settings_of",
]
