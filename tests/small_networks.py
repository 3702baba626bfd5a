"""Small networks for the tests of attacks."""

import torch
from torch import nn

from timm_jem.data import Splits


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
