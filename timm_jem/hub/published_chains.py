"""Published chains: a replay buffer as 8-bit images, small enough to travel with its model."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from timm_jem.errors import InputError, check_whole, quoted
from timm_jem.files import read_tensors, write_tensors
from timm_jem.inputs import is_floats, is_labels, kind
from timm_jem.pixels import eight_bit, to_pixels

__all__ = ["CHAINS_FILE", "MAX_CHAINS_BYTES", "MAX_FILE_BYTES", "PublishedChains"]

CHAINS_FILE = "replay_buffer.safetensors"
MAX_CHAINS_BYTES = 64 * 2**20
MAX_FILE_BYTES = 2 * MAX_CHAINS_BYTES + 2**20  # images, labels, and what names them


@dataclass(frozen=True, eq=False)
class PublishedChains:
    """Chains that stopped where training ended, for :meth:`timm_jem.JEM.sample` to go on from.

    Attributes:
        images: 8-bit pixels, uint8, shape (N, C, H, W).
        labels: classes of class-conditional chains, int64, shape (N,), or None for chains of E(x).

    Raises:
        InputError: no such images or labels, or more than travel with a model.
    """

    images: Tensor
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.ndim != 4 or not images.numel():
            raise InputError(
                f"published chains are {kind(images)}: give 8-bit images, uint8, shape (N, C, H, W); "
                "PublishedChains.of_pixels makes them of pixels"
            )
        if labels is not None and not is_labels(labels, len(images), images):
            raise InputError(f"labels of published chains are {kind(labels)}: give int64, shape ({len(images)},)")
        if images.is_meta:
            raise InputError("published chains are on the meta device and hold nothing: give those of a real one")
        if labels is not None and labels.min() < 0:
            raise InputError(f"published chains have the label {int(labels.min())}: give classes, 0 and above")
        if max(images.nbytes, 0 if labels is None else labels.nbytes) > MAX_CHAINS_BYTES:
            raise InputError(f"published chains are above {MAX_CHAINS_BYTES >> 20} MiB: publish fewer")

    def check_fit(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        """Raise an InputError unless these are chains of a model of such images and classes."""
        check_whole("num_classes", num_classes, 1)
        if not isinstance(image_shape, (tuple, list)) or tuple(self.images.shape[1:]) != tuple(image_shape):
            raise InputError(
                f"published chains are images of {tuple(self.images.shape[1:])}: this model's images are {quoted(image_shape)}"
            )
        if self.labels is not None and self.labels.max() >= num_classes:
            raise InputError(
                f"published chains have labels up to {int(self.labels.max())} that are not one of {num_classes} classes: "
                "set jem.chains = None, or to chains of this model"
            )

    @classmethod
    def of_pixels(cls, u: Tensor, labels: Tensor | None = None, *, max_bytes: int = MAX_CHAINS_BYTES) -> "PublishedChains":
        """Chains rounded to 8 bits, as many as fit, evenly from all.

        Args:
            u: pixels, shape (N, C, H, W); what leaves [-1, 1] is cut.
            labels: classes, shape (N,), or None.
            max_bytes: the most that the images may take.

        Raises:
            InputError: ``u`` that is no such tensor or holds NaN, labels of another number, or no room for one chain.
        """
        if not is_floats(u) or u.ndim != 4 or not u.numel() or u.is_meta:
            raise InputError(f"chains to publish are {kind(u)}: give floating-point pixels in [-1, 1], shape (N, C, H, W)")
        if labels is not None and not is_labels(labels, len(u), u):
            raise InputError(f"labels of published chains are {kind(labels)}: give one a chain, shape ({len(u)},)")
        check_whole("max_bytes of published chains", max_bytes, 0)
        n = min(len(u), max_bytes // max(u[0].numel(), 1))
        if n < 1:
            raise InputError(f"one chain of shape {tuple(u.shape[1:])} is above {max_bytes} bytes: leave the replay buffer out")
        rows = (torch.arange(n) * len(u) // n).to(u.device)
        images = eight_bit(u[rows]).cpu()
        return cls(images.contiguous(), None if labels is None else labels[rows].cpu())

    def __len__(self) -> int:
        return len(self.images)

    def draw(self, n: int, y: Tensor | None, generator: torch.Generator | None) -> tuple[Tensor, Tensor | None]:
        """``n`` distinct chains: pixels in [-1, 1], shape (n, C, H, W), and their labels, shape (n,), or None.

        Args:
            n: how many.
            y: their classes, int64, shape (n,); None: any, each under its own label.
            generator: the only source of randomness.

        Raises:
            InputError: more chains than there are, or classes of chains that have none.
        """
        check_whole("number of published chains to draw", n, 1)
        if not (generator is None or isinstance(generator, torch.Generator)):
            raise InputError(f"generator is a {type(generator).__name__}: give torch.Generator().manual_seed(seed)")
        if y is not None and not is_labels(y, n, self.images):
            raise InputError(f"y is {kind(y)}: give classes, int64, shape ({quoted(n)},)")
        device = None if generator is None else generator.device
        order = torch.randperm(len(self), generator=generator, device=device).cpu()
        if y is None:
            if n > len(self):
                raise InputError(f"{quoted(n)} images from {len(self)} published chains: ask for fewer, or start from noise")
            rows = order[:n]
        elif self.labels is None:
            raise InputError("the published chains have no classes: leave y out, or start from noise")
        else:
            rows, wanted = torch.empty(n, dtype=torch.int64), y.cpu()
            for label in wanted.unique():
                of_class, places = order[self.labels[order] == label], (wanted == label).nonzero().flatten()
                if len(places) > len(of_class):
                    raise InputError(
                        f"{len(places)} images of class {int(label)} from {len(of_class)} published chains of it: "
                        "ask for fewer, or start from noise"
                    )
                rows[places] = of_class[: len(places)]
        u = to_pixels(self.images[rows])
        return u, None if self.labels is None else self.labels[rows]

    def tensors(self) -> dict[str, Tensor]:
        """What :meth:`save` writes."""
        tensors = {"images": self.images} | ({} if self.labels is None else {"labels": self.labels})
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def save(self, file: str | os.PathLike) -> None:
        """Write them as safetensors.

        Raises:
            InputError: the file can't be written; one that was there is as before.
        """
        write_tensors(file, self.tensors())

    @classmethod
    def load(cls, file: str | os.PathLike, image_shape: tuple[int, int, int], num_classes: int) -> "PublishedChains":
        """Read them for a model of these images and classes.

        Raises:
            InputError: a file that is missing, broken, too large, or of other images or classes.
        """
        file = Path(file)
        tensors, _ = read_tensors(file, MAX_FILE_BYTES, "PublishedChains.save", "load the model with replay_buffer=False")
        if not {"images"} <= tensors.keys() <= {"images", "labels"}:
            held = quoted(sorted(tensors)) if tensors else "nothing"
            raise InputError(f"{file.name} holds {held}: published chains are images and labels")
        try:
            chains = cls(**tensors)
            chains.check_fit(image_shape, num_classes)
        except InputError as error:
            raise InputError(f"{file.name}: {error}") from error
        return chains
