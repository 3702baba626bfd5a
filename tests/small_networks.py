"""Small networks, trained on the digits or of random weights."""

import torch
from torch import nn

import timm_jem
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


def random_network(name: str, size: int = 32, n: int = 60, classes: int = 4) -> tuple[timm_jem.JEM, torch.Tensor, torch.Tensor]:
    """A network of random weights, statistics of BatchNorm included, and images; the head is no constant."""
    torch.manual_seed(0)
    jem = timm_jem.create_model(name, num_classes=classes, input_size=(3, size, size), drop_rate=0.5)
    for module in jem.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2)
    jem.backbone.reset_classifier(classes)
    for key, parameter in jem.backbone.named_parameters():
        if key.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return jem.train(), torch.randn(n, 3, size, size), torch.arange(n) % classes


def of_few_images(jem: timm_jem.JEM, name: str) -> timm_jem.ood.Detector:
    """A detector to fit to few images of a random network: beyond some components their features hold little but rounding."""
    return timm_jem.ood.Detector(jem, name, **{"knn": {"k": 5}, "vim": {"d": 4}}.get(name, {}))
