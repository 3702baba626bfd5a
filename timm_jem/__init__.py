"""Joint energy models on timm backbones: one network that classifies, scores, and draws images."""

from timm_jem import models
from timm_jem.chains import Chains
from timm_jem.energy import energy, log_density
from timm_jem.errors import InputError
from timm_jem.gaussians import ClassGaussians
from timm_jem.model import JEM, create_model, wrap
from timm_jem.objectives import ObjectiveConfig, joint_loss
from timm_jem.replay_buffer import ReplayBuffer, redistribute
from timm_jem.sampling import SGLDConfig, sgld, sgld_step, uniform_noise

from_pretrained = JEM.from_pretrained

__version__ = "0.1.0"

__all__ = [
    "JEM",
    "Chains",
    "ClassGaussians",
    "InputError",
    "ObjectiveConfig",
    "ReplayBuffer",
    "SGLDConfig",
    "create_model",
    "energy",
    "from_pretrained",
    "joint_loss",
    "log_density",
    "models",
    "redistribute",
    "sgld",
    "sgld_step",
    "uniform_noise",
    "wrap",
]
