"""Joint energy models on timm backbones: one network that classifies, scores, and draws images."""

from timm_jem import models, ood
from timm_jem.energy import energy, log_density
from timm_jem.errors import InputError
from timm_jem.gaussians import ClassGaussians
from timm_jem.heap import keep_freed_memory
from timm_jem.hub.published_chains import PublishedChains
from timm_jem.model import JEM
from timm_jem.noise import uniform_noise
from timm_jem.objectives import ObjectiveConfig, joint_loss
from timm_jem.prediction import Prediction
from timm_jem.reference import Reference
from timm_jem.replay_buffer import ReplayBuffer
from timm_jem.sampling import SGLDConfig, sgld, sgld_step
from timm_jem.version import __version__
from timm_jem.wrap import create_model, from_pretrained, wrap

__all__ = [
    "JEM",
    "ClassGaussians",
    "InputError",
    "ObjectiveConfig",
    "Prediction",
    "PublishedChains",
    "Reference",
    "ReplayBuffer",
    "SGLDConfig",
    "__version__",
    "create_model",
    "energy",
    "from_pretrained",
    "joint_loss",
    "keep_freed_memory",
    "log_density",
    "models",
    "ood",
    "sgld",
    "sgld_step",
    "uniform_noise",
    "wrap",
]
