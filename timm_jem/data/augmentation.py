"""Random changes of training images: JEM's crops and flips, and timm's policies (RandAugment, AutoAugment, AugMix)."""

import random
import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image as PILImage
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, posterize, rand_augment_transform
from torch import Tensor

from timm_jem.errors import InputError, one_line, quoted

__all__ = ["AutoAugment", "augment"]

_RAND_SETS = ("weights", "3a", "3aw")


def augment(images: Tensor, *, crop_padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Random crops after reflective padding, and horizontal flips, each image its own (JEM's, for CIFAR-10).

    Args:
        images: of any type, shape (B, C, H, W), on ``generator``'s device.
        crop_padding: pixels on each side, fewer than the image has; 0: no crops.
        flip: flip every other image, at random.
        generator: the only source of randomness.

    Returns:
        Images of the same shape.
    """
    batch, channels, height, width = images.shape
    if not (crop_padding or flip):
        return images
    device, offsets = images.device, torch.zeros(2, batch, 1, dtype=torch.long, device=images.device)
    if crop_padding:
        offsets = torch.randint(2 * crop_padding + 1, (2, batch, 1), generator=generator, device=device) - crop_padding
    rows, columns = (_reflected(offset, side) for offset, side in zip(offsets, (height, width), strict=True))
    if flip:
        flipped = torch.rand(batch, 1, generator=generator, device=device) < 0.5
        columns = torch.where(flipped, columns.flip(-1), columns)
    places = (rows.unsqueeze(-1) * width + columns.unsqueeze(-2)).view(batch, 1, -1).expand(-1, channels, -1)
    return images.flatten(2).gather(2, places).view_as(images)


def _reflected(offset: Tensor, side: int) -> Tensor:
    """Which rows of an image of ``side`` a window of as many takes that begins at ``offset``; beyond its edge they go back."""
    places = (offset + torch.arange(side, device=offset.device)).abs()
    return side - 1 - (side - 1 - places).abs()


class AutoAugment:
    """One of timm's augmentation policies, each image by its own seed.

    Args:
        policy: as timm's ``--aa``: "rand-m9-mstd0.5", "augmix-m3-w3", "original", "originalr", "v0", "v0r" or "3a", with
            their sections. Grey images go through RGB and back.
        size: (H, W) of the images, which bounds how far they are moved, as in timm's ``create_transform``.

    Raises:
        InputError: a policy that timm doesn't know, or a section of it that has no effect.
    """

    def __init__(self, policy: str, size: tuple[int, int]) -> None:
        self.policy = policy
        hint = "give one of timm's, such as rand-m9-mstd0.5, augmix-m3-w3, original, v0 or 3a"
        name, *sections = policy.split("-")
        for section in sections:
            # timm passes over a section without a number.
            if not re.search(r"\d", section) and not (name == "rand" and section.removeprefix("t") in _RAND_SETS):
                raise InputError(
                    f"auto_augment {quoted(policy)} has the section {quoted(section)}, which has no effect: {hint}"
                )
        settings = {"translate_const": int(min(size) * 0.45), "img_mean": (128, 128, 128)}
        try:
            if name == "rand":
                self.transform = rand_augment_transform(policy, settings)
            elif name == "augmix":
                self.transform = augment_and_mix_transform(policy, {**settings, "translate_pct": 0.3})
            else:
                self.transform = auto_augment_transform(policy, settings)
            _mend_posterize(self.transform)
            # Some numbers only break when the policy is used.
            self(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), [[i] for i in range(4)])
        except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
            raise InputError(f"auto_augment {quoted(policy)} is not a policy ({one_line(error)}): {hint}") from error

    def __call__(self, images: Tensor, seeds: Sequence[Sequence[int]]) -> Tensor:
        """Change each image at random, by its seed alone.

        timm draws from Python's and numpy's global generators: they are left as they were found.

        Args:
            images: 8-bit images, shape (B, C, H, W), C = 1 or 3, on the CPU.
            seeds: for each image the whole numbers that its randomness depends on.

        Returns:
            8-bit images of the same shape.
        """
        python_state, numpy_state = random.getstate(), np.random.get_state()
        try:
            return torch.stack([self._one(image, seed) for image, seed in zip(images, seeds, strict=True)])
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)

    def _one(self, image: Tensor, seed: Sequence[int]) -> Tensor:
        words = np.random.SeedSequence(seed).generate_state(8)
        random.seed(words[:4].tobytes())
        np.random.seed(words[4:])
        pixels = image.permute(1, 2, 0).numpy()
        picture = PILImage.fromarray(pixels[..., 0] if len(image) == 1 else pixels).convert("RGB")
        changed = self.transform(picture).convert("L" if len(image) == 1 else "RGB")
        return torch.from_numpy(np.array(changed)).view(*image.shape[1:], len(image)).permute(2, 0, 1).contiguous()


def _mend_posterize(transform: Callable) -> None:
    """Let timm's policies posterize to 0 bits, which is black, as they do at small magnitudes: Pillow 13 refuses it."""
    ops = [op for sub_policy in getattr(transform, "policy", []) for op in sub_policy] + list(getattr(transform, "ops", []))
    for op in ops:
        if op.aug_fn is posterize:
            op.aug_fn = _posterize


def _posterize(image: PILImage.Image, bits: int, **settings) -> PILImage.Image:
    return PILImage.new(image.mode, image.size) if bits < 1 else posterize(image, bits, **settings)
