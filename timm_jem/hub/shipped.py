"""Small trained models that come with the package."""

import os
from pathlib import Path

__all__ = ["SHIPPED", "shipped"]

_FOLDER = Path(__file__).parent.parent / "pretrained"
SHIPPED = ("cifar10", "digits", "fashion_mnist")


def shipped(name: str | os.PathLike) -> Path | None:
    """The folder of a model that comes with the package; None: it has none of this name."""
    return _FOLDER / name if isinstance(name, str) and name in SHIPPED else None
