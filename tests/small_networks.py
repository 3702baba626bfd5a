"""Small networks, trained ones and some whose energies have closed forms."""

import torch
from torch import nn

import timm_jem
from timm_jem import SGLDConfig
from timm_jem.data import Splits

SHAPE = (1, 4, 4)
MEANS, STDS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, whose way to pixels and back rounds


class Wells(nn.Module):
    """E(x, y) = ½ · sharpness · |x − m_y|², in pixels: mean and std of ½ leave them alone."""

    num_classes = 3

    def __init__(self, sharpness=1.0):
        super().__init__()
        self.sharpness = sharpness
        centres = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
        self.centres = nn.Parameter(centres)

    def forward(self, x):
        return -0.5 * self.sharpness * (x[:, None] - self.centres).square().flatten(2).sum(2)


class Gaussian(nn.Module):
    """One class: E(x) = ½ (x − m)ᵀ A (x − m), in pixels."""

    num_classes = 1

    def __init__(self, precision, mean):
        super().__init__()
        self.precision, self.mean = nn.Parameter(precision), nn.Parameter(mean)

    def forward(self, x):
        away = x.flatten(1) - self.mean
        return -0.5 * torch.einsum("bi,ij,bj->b", away, self.precision, away)[:, None]


def in_pixels(backbone, shape=SHAPE, **sgld):
    """Its joint energy model, whose input is pixels in [-1, 1]."""
    data_config = {"input_size": shape, "mean": (0.5,), "std": (0.5,)}
    return timm_jem.JEM(backbone, data_config=data_config, sgld=SGLDConfig(**sgld))


class Kept:
    """What a model was, to be compared with what it is: weights, statistics, flags and gradients."""

    def __init__(self, model):
        self.model, self.state = model, {name: value.clone() for name, value in model.state_dict().items()}
        self.flags = self._flags()

    def _flags(self):
        modules = [(m.training, getattr(m, "track_running_stats", None)) for m in self.model.modules()]
        return modules, [(p.requires_grad, None if p.grad is None else id(p.grad)) for p in self.model.parameters()]

    def check(self):
        assert self._flags() == self.flags
        for name, value in self.model.state_dict().items():
            assert torch.equal(value, self.state[name]), name


def trained_on_digits(splits: Splits, seed: int) -> nn.Module:
    """A network that reads the digits from images in [0, 1]; frozen."""
    images, y = splits.train.images.float() / 255, splits.train.labels
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return network.eval().requires_grad_(False)
