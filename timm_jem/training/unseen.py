"""Pixels that a backbone does not look at, which no chain could move."""

import torch

from timm_jem.backbone import patch_size
from timm_jem.model import JEM
from timm_jem.modes import frozen

__all__ = ["unseen_pixels", "why_unseen"]


def unseen_pixels(jem: JEM, image_shape: tuple[int, int, int]) -> torch.Tensor:
    """Which pixels can have no influence on the energy, whatever is learnt, bool, shape (H, W): no chain could move them.

    What starts as zero, such as the last normalisation of a residual branch, hides pixels that training will see: it is
    random meanwhile.
    """
    unseen, zeros = torch.ones(image_shape[1:], dtype=torch.bool), [p for p in jem.parameters() if not p.any()]
    try:
        for seed in range(4):  # what one image leaves out by chance, another has
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for parameter in zeros:
                    parameter.copy_(torch.rand(parameter.shape, generator=generator))
            u = torch.rand(2, *image_shape, generator=generator) * 2 - 1
            with frozen(jem):
                score = jem.score(jem.normalize(u.to(jem.device)))
            unseen &= (score == 0).all(0).all(0).cpu()
            if not unseen.any():
                break
    finally:
        with torch.no_grad():
            for parameter in zeros:
                parameter.zero_()
    return unseen


def why_unseen(name: str, jem: JEM, unseen: torch.Tensor) -> str:
    """The line that refuses backbone ``name`` for these pixels, and sides of images that fit it."""
    side, (patch, _) = len(unseen), patch_size(jem.backbone) or (None, None)
    seen = int((~unseen).any(1).sum())
    fits = f"{patch * (side // patch)} or {patch * (side // patch + 1)}" if patch and side >= patch else f"{seen}"
    return (
        f"{name} does not look at {unseen.float().mean():.0%} of the pixels of {side}×{unseen.shape[1]} images, which chains "
        f"could never move: give another --data.image_size, such as {fits}"
    )
