"""Endless batches of images for the cross-entropy and for p(x), from streams that can be put back to any place."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from timm_jem.data import Splits
from timm_jem.data.augmentation import augment
from timm_jem.data.loader import open_stream
from timm_jem.noise import randn
from timm_jem.pixels import to_pixels

__all__ = ["Batch", "Batches"]


@dataclass
class Batch:
    """Images of one iteration, pixels in [-1, 1], with the noise that training adds.

    Attributes:
        u: for p(x), shape (B, C, H, W).
        y: their labels, int64, shape (B,); −1: unknown.
        u_ce, y_ce: for the cross-entropy, where it has views, noise or images of its own, shapes (N, C, H, W) and (N,);
            None: ``u`` and ``y``.
        clean: ``u`` without noise, for what tells chains from images; None: ``u``.
    """

    u: Tensor
    y: Tensor
    u_ce: Tensor | None = None
    y_ce: Tensor | None = None
    clean: Tensor | None = None


class Batches:
    """Gives a :class:`Batch` at each ``next``; 8-bit images travel to the device, where they become pixels.

    JEM takes the same augmented images for the cross-entropy and for p(x); SADA-JEM (arXiv 2209.07959) takes 64
    un-augmented ones for p(x) and 128 augmented ones for the cross-entropy. Where some images have no label, the
    cross-entropy has batches of its own, of those that have one.

    Args:
        splits: the data.
        batch_size: images for p(x), of this process.
        generator: randomness of augmentation and noise, on the training device.
        energies: False for cross-entropy alone: then no image without label is read.
        ce_batch_size: batches of their own for the cross-entropy, of so many images; None: the same images.
        px_augment: how images for p(x) are augmented: "full" (as for the cross-entropy), "flip" or "none".
        ce_auto_augment: timm's policy for the images of the cross-entropy, which then come in batches of their own.
        noise: standard deviation of the Gaussian noise on the images for p(x), pixels (JEM, arXiv 1912.03263: 0.03).
        ce_noise: that on the images of the cross-entropy; None: as ``noise``, and where it has no images or views of its
            own, the very same images.
        seed, rank, world, workers: see :class:`timm_jem.data.loader.ImageStream`.

    Raises:
        InputError: an unknown augmentation policy, or images that can't be decoded when they come up.
    """

    def __init__(
        self,
        splits: Splits,
        batch_size: int,
        *,
        generator: torch.Generator,
        energies: bool = True,
        ce_batch_size: int | None = None,
        px_augment: str = "full",
        ce_auto_augment: str | None = None,
        noise: float = 0.03,
        ce_noise: float | None = None,
        seed: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
    ) -> None:
        self.splits, self.generator, self.px_augment, self.world = splits, generator, px_augment, world
        self.noise, self.ce_noise = noise, noise if ce_noise is None else ce_noise
        self.shared = ce_noise is None and px_augment == "full"
        place = {"rank": rank, "world": world, "workers": workers}
        labeled = splits.train if splits.labeled is None else splits.labeled
        self.streams = {}
        if energies:
            self.streams["px"] = open_stream(splits.train, batch_size, seed=seed, **place)
        if not energies or splits.labeled is not None or ce_batch_size is not None or ce_auto_augment is not None:
            self.streams["ce"] = open_stream(
                labeled, ce_batch_size or batch_size, seed=seed + 1, auto_augment=ce_auto_augment, **place
            )

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        if "px" not in self.streams:
            images, y = self._next("ce")
            return Batch(self._noisy(self._pixels(images), self.ce_noise), y)
        images, y = self._next("px")
        clean, u_ce, y_ce = self._pixels(images, self.px_augment), None, None
        if "ce" in self.streams:
            u_ce, y_ce = self._next("ce")
            u_ce = self._noisy(self._pixels(u_ce), self.ce_noise)
        elif not self.shared:
            u_ce = self._noisy(clean if self.px_augment == "full" else self._pixels(images), self.ce_noise)
        return Batch(self._noisy(clean, self.noise), y, u_ce, y_ce, clean)

    def _next(self, name: str) -> tuple[Tensor, Tensor]:
        images, y = next(self.streams[name])
        device = self.generator.device
        return images.to(device, non_blocking=True), y.to(device, non_blocking=True)

    def _pixels(self, images: Tensor, augmented: str = "full") -> Tensor:
        padding, flip = (self.splits.crop_padding if augmented == "full" else 0), (self.splits.flip and augmented != "none")
        return to_pixels(augment(images, crop_padding=padding, flip=flip, generator=self.generator))

    def _noisy(self, u: Tensor, std: float) -> Tensor:
        return u + std * randn(u.shape, generator=self.generator, device=u.device, dtype=u.dtype) if std else u

    def state_dict(self) -> dict[str, Any]:
        """The place of each stream; the randomness is the generator's."""
        return {name: stream.state_dict() for name, stream in self.streams.items()}

    def load_state_dict(self, state: dict[str, Any], *, old_world: int | None = None) -> None:
        """Go on from ``state``. A stream that it doesn't know starts at its beginning, and one that is no more is left out.

        Args:
            state: what ``state_dict`` gave.
            old_world: how many processes there were then, where they were more or fewer: a streamed set then goes on about
                where it was, other sets exactly.

        Raises:
            InputError: places of another kind of stream.
        """
        for name, stream in self.streams.items():
            if name not in state:
                continue
            place = dict(state[name])
            if old_world is not None and "offset" in place:  # each process's own, in its share
                place["offset"] = place["offset"] * old_world // self.world
                stream.load_state_dict(place, about=True)
            else:
                stream.load_state_dict(place)

    def close(self) -> None:
        """End the processes that decode images."""
        for stream in self.streams.values():
            stream.close()
