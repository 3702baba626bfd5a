"""What a model believes, as pictures: images that it is sure of, and lines of energy."""

import math

import torch
from torch import Tensor

from timm_jem.errors import InputError, check_number, check_whole
from timm_jem.evaluation.attacks import l2_step
from timm_jem.evaluation.labelled import labels as class_labels
from timm_jem.inputs import FAR_FROM_PIXELS
from timm_jem.model import JEM
from timm_jem.modes import frozen
from timm_jem.noise import chain_generators, draw_seeds, uniform_noise
from timm_jem.progress import tqdm
from timm_jem.sampling import filled

__all__ = ["distal_adversarials", "interpolation_paths"]


def distal_adversarials(
    jem: JEM,
    y: Tensor,
    *,
    generator: torch.Generator | None = None,
    steps: int = 500,
    step_size: float | None = None,
    confidence: float = 0.9,
    batch_size: int = 256,
) -> tuple[Tensor, Tensor]:
    """Images from uniform noise of which the classifier is sure: p(y|x) of at least ``confidence``.

    Each goes up the slope of log p(y|x), not of p(x), within [-1, 1], and stops when the classifier is sure. Source: JEM
    (arXiv 1912.03263), section 5.4 and figure 6, with p = 0.9, after Schott et al. (arXiv 1805.09190): there, what makes a
    plain classifier sure still looks like noise, and what makes a joint energy model sure like an image. Whether that is so
    of a model is for its pictures and energies to say. The steps are ours.

    Args:
        jem: the model, or any wrapped classifier; its flags are left as they were.
        y: the classes, int64, shape (N,).
        generator: the only source of randomness (None: PyTorch's global one). The same seed gives the same noise to start
            from, image by image, whatever ``batch_size`` and however many follow.
        steps: the most steps.
        step_size: ℓ2 length of a step in pixels in [-1, 1]; None: 0.01 · √(C·H·W), which is 0.01 a pixel on average.
        confidence: where an image stops.
        batch_size: images through the network at once, though never fewer than four are.

    Returns:
        Pixels in [-1, 1], shape (N, C, H, W), and their p(y|x), shape (N,), on the CPU. An image whose p(y|x) is below
        ``confidence`` was not finished after all steps.

    Raises:
        InputError: classes that the model doesn't have, none, or a setting out of range.
    """
    check_whole("steps of distal adversarials", steps, 1)
    check_number("confidence of distal adversarials", confidence, above=0, most=1)
    check_whole("batch_size", batch_size, 1)
    size = 0.01 * math.sqrt(math.prod(jem.input_size)) if step_size is None else step_size
    check_number("step_size of distal adversarials", size, above=0)
    y = class_labels(y, num_classes=jem.num_classes, what="classes")
    generators = chain_generators(draw_seeds(len(y), generator))
    noise = uniform_noise((len(y), *jem.input_size), generator=generators, dtype=torch.float32)
    images, probabilities = [], []
    with torch.inference_mode(False), torch.enable_grad(), frozen(jem):
        batches = list(zip(noise.split(batch_size), y.split(batch_size), strict=True))
        for u, labels in tqdm(batches, desc="distal adversarials", leave=False):
            count, u, labels = len(u), filled(u), filled(labels)
            u, own = u.clone().to(jem.device), labels.clone().to(jem.device)[:, None]
            for step in range(steps + 1):
                u = u.detach().requires_grad_(True)
                log_p = jem(jem.normalize(u)).float().log_softmax(1).gather(1, own).squeeze(1)
                sure = log_p.detach().exp() >= confidence
                if step == steps or sure.all():
                    break
                slope = torch.autograd.grad(log_p.sum(), u)[0]
                u = torch.where(sure[:, None, None, None], u, (u + l2_step(slope, size)).clamp(-1, 1))
            images.append(u[:count].detach().cpu())
            probabilities.append(log_p[:count].detach().exp().cpu())
    return torch.cat(images), torch.cat(probabilities)


@torch.no_grad()
def interpolation_paths(jem: JEM, a: Tensor, b: Tensor, num: int = 7, *, batch_size: int = 256) -> tuple[Tensor, Tensor]:
    """Straight lines from images to others, and E(x) along them (JEM, arXiv 1912.03263, eq. 7).

    Args:
        jem: the model; its flags are left as they were.
        a, b: pixels in [-1, 1], shapes (N, C, H, W).
        num: images on a line, both ends included.
        batch_size: images through the network at once.

    Returns:
        Pixels, shape (N, num, C, H, W), and energies in nats, shape (N, num), on the CPU.

    Raises:
        InputError: images that aren't pixels, or not pairs of them, or fewer than 2 a line.
    """
    check_whole("images on a line", num, 2)
    check_whole("batch_size", batch_size, 1)
    _check_pixels(jem, a)
    _check_pixels(jem, b)
    if a.shape != b.shape:
        raise InputError(f"lines from images of shape {tuple(a.shape)} to {tuple(b.shape)}: give pairs")
    t = torch.linspace(0, 1, num)[None, :, None, None, None]
    paths = (1 - t) * a.cpu()[:, None] + t * b.cpu()[:, None]
    with frozen(jem):
        batches = tqdm(paths.flatten(0, 1).split(batch_size), desc="lines between images", leave=False)
        energies = torch.cat([jem.pixel_energy(part.to(jem.device)).float().cpu() for part in batches])
    return paths, energies.view(len(a), num)


def _check_pixels(jem: JEM, u: Tensor) -> None:
    channels = jem.input_size[0]  # others would be broadcast
    if not isinstance(u, Tensor):
        raise InputError(f"images are a {type(u).__name__}: give a tensor of pixels in [-1, 1], (N, {channels}, H, W)")
    if u.ndim != 4 or u.shape[1] != channels or not u.is_floating_point() or len(u) == 0:
        raise InputError(
            f"images have shape {tuple(u.shape)} and dtype {u.dtype}: give pixels in [-1, 1], shape (N, {channels}, H, W), at "
            "least one; timm_jem.pixels.to_pixels makes them of 8-bit images"
        )
    if not u.abs().max() <= FAR_FROM_PIXELS:  # NaN, too
        raise InputError(f"images have pixels of up to {u.abs().max():.3g}: give pixels in [-1, 1]")
