"""Stochastic gradient Langevin dynamics (SGLD) over any callable energy, in pixels.

Nothing here knows networks' heads or buffers: an energy is a function ``energy_fn(u)`` or ``energy_fn(u, y)`` that
returns shape (B,), and a chain's state is a plain tensor of pixels.
"""

import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from timm_jem.errors import InputError, check_number, check_whole, quoted
from timm_jem.inputs import is_floats, kind
from timm_jem.noise import Generators, check_generators, randn

__all__ = ["FEWEST", "MOST_STEPS", "SGLDConfig", "check_settings", "filled", "sgld", "sgld_step", "shifted"]

# Of a chain: far above any in use, and what a file that is to keep its reader busy for ever may ask for.
MOST_STEPS = 100_000
_MOST_JITTER = 1000  # pixels
_FAR = 1e9  # a factor or bound in pixels that is above this is a mistake; single precision holds 3e38

FEWEST = 4  # chains in a batch: matrix products of fewer rows take other paths, and round otherwise

_NOISE_AT_ONCE = 2**20  # numbers


@dataclass(frozen=True)
class SGLDConfig:
    """How chains move. Defaults are JEM's (arXiv 1912.03263, appendix A, and its released code).

    A step is ``u ← u − step_size · ∇E(u) + noise_std · N(0, I)`` in pixels in [-1, 1]. The paper's equation 3 ties the
    two (gradient times α/2, noise variance α); like the paper's experiments these settings untie them, and
    ``step_size`` multiplies the gradient itself, without the ½.

    Attributes:
        num_steps: steps K of a chain per training iteration (paper: 20); as all numbers of steps at most 100,000.
        step_size: factor of the energy's gradient (paper: 1); at most 10⁹.
        noise_std: standard deviation of a step's Gaussian noise, pixels (paper: 0.01); at most 2, their whole range.
        normalize_grad: divide an image's gradient by its root mean square over the pixels, so that ``step_size`` is how far a
            step goes, root mean square in pixels, whatever the energies' scale: the step of DAT (arXiv 2510.13872), whose
            ℓ2 length is step_size · √(C·H·W). A fixed step size that fits the energies at first is too long for what
            they become: chains then bounce, above where they started (paper: no).
        grad_clamp: elementwise bound of the gradient, or None (paper: none; JEM++, arXiv 2109.09032: 1).
        pixel_clamp: elementwise bound of the chain after each step, or None (paper: none; JEM++: 1).
        sample_steps: steps of a fresh chain in ``JEM.sample``, ``denoise_steps`` included; None: ``num_steps``.
            The training recipe finds it on validation images, unless it is told.
        denoise_steps: how many of the last steps of a fresh or published chain add no noise in ``JEM.sample``, and in
            ``JEM.restore`` (paper: 0). They take away the noise that a chain always carries.
        step_decay: the step size falls evenly to 0 within a chain, as in arXiv 2605.23819: that of step k = 0, …, K − 1 is
            ``step_size`` · (1 − k / K) (paper: no). K is the number of steps that a chain makes at a time: in training those
            of an iteration, in ``JEM.sample`` its ``num_steps``. The noise stays as it is; ``denoise_steps`` leaves it out of
            the last steps, where it would outweigh them.
        jitter: where a model draws, each step takes the gradient at the chain moved by −jitter to jitter − 1 pixels down and
            right, what leaves at one side entering at the other; the (2 · jitter)² such shifts take turns (paper: 0). So it
            draws by about the mean energy of an image's shifts. A network with strides gives an image and the same image
            moved by a pixel different energies, and by one of them alone chains grow patterns of the strides' periods; as many
            shifts as a period has, or a multiple of it, take them out. (Feature visualisation has the same remedy: Olah et
            al., Distill 2017, "transformation robustness".) Chains of training are not moved, nor are images that are refined.
        rest: where a model draws, a fresh chain makes no step while its energy is no higher than those of this share of
            held-out images, of its class where it has one: see :class:`timm_jem.Reference` (paper: None, for none; this
            package's choice). The energies of chains fall with every step, in the end below those of nearly all images: so
            the fast ones wait for the slow, and long chains stay about as near to images as short ones.

    Raises:
        InputError: a value outside its range, NaN included: settings come with models of others, too.
    """

    num_steps: int = 20
    step_size: float = 1.0
    noise_std: float = 0.01
    normalize_grad: bool = False
    grad_clamp: float | None = None
    pixel_clamp: float | None = None
    sample_steps: int | None = None
    denoise_steps: int = 0
    step_decay: bool = False
    jitter: int = 0
    rest: float | None = None

    def __post_init__(self) -> None:
        check_whole("sgld num_steps", self.num_steps, 1, MOST_STEPS)
        if self.sample_steps is not None:
            check_whole("sgld sample_steps", self.sample_steps, 1, MOST_STEPS)
        check_whole("sgld denoise_steps", self.denoise_steps, 0, MOST_STEPS)
        check_whole("sgld jitter", self.jitter, 0, _MOST_JITTER)
        check_number("sgld step_size", self.step_size, above=0, most=_FAR)
        check_number("sgld noise_std", self.noise_std, least=0, most=2)
        for name in ("normalize_grad", "step_decay"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"sgld {name} is {quoted(getattr(self, name))}: give true or false")
        if self.rest is not None:
            check_number("sgld rest", self.rest, least=0, most=1)
        for name in ("grad_clamp", "pixel_clamp"):
            if getattr(self, name) is not None:
                check_number(f"sgld {name}", getattr(self, name), above=0, most=_FAR)
        for field in fields(self):  # JSON, which keeps them with a model, has Python's numbers only
            value = getattr(self, field.name)
            if not (value is None or isinstance(value, (int, float))):
                object.__setattr__(self, field.name, int(value) if isinstance(value, numbers.Integral) else float(value))

    def of_step(self, step: int, num_steps: int) -> "SGLDConfig":
        """The settings of one step, ``step`` of 0, …, ``num_steps`` − 1: with ``step_decay`` its share of ``step_size``."""
        if not self.step_decay:
            return self
        return replace(self, step_size=self.step_size * (1 - step / num_steps), step_decay=False)

    def shift(self, step: int) -> tuple[int, int]:
        """By how many pixels, down and right, a chain is moved where its gradient is taken in step ``step``; by none in step 0.

        Jumps of about 0.618 of all shifts come to each of them once before any comes again, the next far from the last.
        """
        if not self.jitter:
            return 0, 0
        side = 2 * self.jitter
        jump = next(n for n in range(round(0.618 * side**2), side**2) if math.gcd(n, side) == 1)
        turn = (step * jump + self.jitter * (side + 1)) % side**2
        return turn // side - self.jitter, turn % side - self.jitter


def check_settings(config: object) -> None:
    """Raise an InputError unless these are settings of chains."""
    if not isinstance(config, SGLDConfig):
        raise InputError(f"the settings of chains are a {type(config).__name__}: give a timm_jem.SGLDConfig")


def sgld_step(u: Tensor, grad: Tensor, noise: Tensor | None, config: SGLDConfig) -> Tensor:
    """One step of SGLD, ``u − step_size · grad + noise_std · noise``, normalised and clamped as ``config`` says; pure.

    Args:
        u: chains, pixels, shape (B, C, H, W).
        grad: ∇E at ``u``, same shape.
        noise: standard normal, same shape; None for a noise-free step.
        config: see :class:`SGLDConfig`; of a chain's step with ``step_decay`` give ``config.of_step(step, num_steps)``.

    Returns:
        The chains one step later, a new tensor. Source: JEM (arXiv 1912.03263), eq. 3, with untied step and noise.
    """
    check_settings(config)
    for name, given in (("chains", u), ("gradients", grad), ("noise", u if noise is None else noise)):
        if not is_floats(given) or given.shape != u.shape or given.is_meta != u.is_meta:
            raise InputError(f"{name} of an SGLD step are {kind(given)}: give floating-point tensors of one shape")
    return _step(u, grad, noise, config)


def _step(u: Tensor, grad: Tensor, noise: Tensor | None, config: SGLDConfig, scale: Tensor | None = None) -> Tensor:
    if config.normalize_grad:
        grad = _normalized(grad)
    if config.grad_clamp is not None:
        grad = grad.clamp(-config.grad_clamp, config.grad_clamp)
    if scale is not None:
        grad = grad * scale
    u = torch.add(u, grad, alpha=-config.step_size)
    if noise is not None:
        u = u.add_(noise, alpha=config.noise_std)
    if config.pixel_clamp is not None:
        u = u.clamp_(-config.pixel_clamp, config.pixel_clamp)
    return u


def _normalized(grad: Tensor) -> Tensor:
    """Each image's gradient by its root mean square; one of zeros stays so, and has a derivative."""
    pixels = tuple(range(1, grad.ndim))
    largest = grad.abs().amax(pixels, keepdim=True)
    zeros = largest == 0
    grad = grad / largest.masked_fill(zeros, 1)  # whose squares neither overflow nor vanish
    return grad / grad.square().mean(pixels, keepdim=True).masked_fill(zeros, 1).sqrt()


def sgld(
    energy_fn: Callable[..., Tensor],
    u: Tensor,
    config: SGLDConfig,
    *,
    y: Tensor | None = None,
    generator: Generators = None,
    num_steps: int | None = None,
    first_step: int = 0,
    denoise_steps: int = 0,
    batch_size: int | None = None,
    rest_at: Tensor | None = None,
    step_scale: Tensor | None = None,
    on_gradient: Callable[[Tensor, Tensor], None] | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Run SGLD chains. No graph outlives a step, no parameter gets a gradient, and nothing waits for the device.

    A step's noise is drawn before the gradients are taken ``batch_size`` chains at a time, so that however chains are split
    they get the same noise; and with one generator a chain, the same whatever other chains there are. Their energies round
    alike where the network rounds alike in batches of any size: see :meth:`timm_jem.JEM.sample`.

    Args:
        energy_fn: ``energy_fn(u)``, or ``energy_fn(u, y)`` when ``y`` is given, to energies of shape (B,). A network in train
            mode may mix images, and moves its BatchNorm statistics: put it into eval mode before.
        u: initial chains, pixels, shape (B, C, H, W); not changed.
        config: see :class:`SGLDConfig`; ``jitter`` counts here, too, but not ``sample_steps``, ``denoise_steps`` and ``rest``.
        y: labels of the chains, shape (B,); chains of E(x, y) instead of E(x).
        generator: the only source of randomness, or a list of them, one a chain (:func:`chain_generators`); None:
            PyTorch's global one.
        num_steps: instead of ``config.num_steps``.
        first_step: how many steps the chains have made before, which says whose turn it is of the shifts of ``config.jitter``;
            0: the first one's again.
        denoise_steps: how many of the last steps are without noise.
        batch_size: chains per gradient evaluation, at least four: fewer are filled up by repeating the last, since the
            matrix products of so few images round differently. None: all at once, just as they are.
        rest_at: energies, shape (B,), on the chains' device: a chain whose energy is no higher makes no step, but for those
            without noise; None: all make all.
        step_scale: a factor of ``config.step_size`` on the chains' device, shape (); None: 1.
        on_gradient: called with (chains, ∇E), both of shape (B, C, H, W), before each step.
        on_step: called with (steps done, chains) after each step.

    Returns:
        The final chains, pixels, detached, shape (B, C, H, W).

    Raises:
        InputError: no chains, fewer than no steps, a ``batch_size`` below 1, another number of generators or labels than of
            chains, an ``on_step`` that can't be called, or energies that are not of shape (B,) or don't depend on ``u``.
    """
    check_settings(config)
    if not callable(energy_fn):
        raise InputError(f"energy_fn is {quoted(energy_fn)}: give a function of chains that returns their energies")
    num_steps = config.num_steps if num_steps is None else num_steps
    if not is_floats(u) or u.ndim == 0:
        raise InputError(f"the chains are {kind(u)}: give floating-point pixels, shape (B, C, H, W)")
    if config.jitter and u.ndim != 4:
        raise InputError(f"the chains are {kind(u)}, and sgld jitter moves images: give shape (B, C, H, W), or jitter 0")
    if not u.numel():
        raise InputError(f"the chains have shape {tuple(u.shape)}: give at least one to start from")
    if y is not None and not (isinstance(y, Tensor) and y.shape[:1] == u.shape[:1]):
        raise InputError(f"y is {kind(y)} for {len(u)} chains: give a tensor of one label per chain, shape ({len(u)},)")
    check_whole("num_steps of chains", num_steps, 0, MOST_STEPS)
    check_whole("first_step of chains", first_step, 0)
    check_whole("denoise_steps of chains", denoise_steps, 0, MOST_STEPS)
    if batch_size is not None:
        check_whole("batch_size of chains", batch_size, 1)
    if on_step is not None and not callable(on_step):
        raise InputError(f"on_step is {quoted(on_step)}: give a function of (steps done, pixels)")
    if rest_at is not None and not (is_floats(rest_at) and rest_at.shape == u.shape[:1]):
        raise InputError(f"rest_at is {kind(rest_at)} for {len(u)} chains: give one energy per chain, shape ({len(u)},)")
    check_generators(generator, len(u))
    with torch.inference_mode(False), torch.enable_grad():
        u = u.detach().clone()  # a clone of an inference tensor is an ordinary one
        y = None if y is None else y.clone()
        noises = _noises(u, num_steps - denoise_steps if config.noise_std > 0 else 0, generator)
        for step in range(num_steps):
            noise = next(noises, None)
            shift = config.shift(first_step + step)
            energies, grad = _gradient(energy_fn, shifted(u, shift), y, batch_size)
            grad = shifted(grad, [-pixels for pixels in shift])
            if on_gradient is not None:
                on_gradient(u, grad)
            moved = _step(u, grad, noise, config.of_step(step, num_steps), step_scale)
            if rest_at is not None and step < num_steps - denoise_steps:
                moved = torch.where((energies <= rest_at).view(-1, *[1] * (u.ndim - 1)), u, moved)
            u = moved
            if on_step is not None:
                on_step(step + 1, u)
    return u


def _noises(u: Tensor, num_steps: int, generator: Generators) -> Iterator[Tensor]:
    """Standard normal noise of the shape of ``u`` for each step in turn."""
    block = 1
    if isinstance(generator, Sequence) and generator[0].device.type == "cpu" and u[0].numel() % 16 == 0:
        # Going from generator to generator takes longer than drawing for a small image. On the CPU normal numbers come in
        # sixteens, so that those of several steps at once are those of one step after another.
        block = max(1, _NOISE_AT_ONCE // u.numel())
    for start in range(0, num_steps, block):
        shape = (len(u), min(block, num_steps - start), *u.shape[1:])
        yield from randn(shape, generator=generator, device=u.device, dtype=u.dtype).unbind(1)


def shifted(u: Tensor, shift: Sequence[int]) -> Tensor:
    """Images moved down and right by ``shift`` pixels, shape (B, C, H, W); what leaves at one side enters at the other."""
    return u.roll(tuple(shift), (-2, -1)) if any(shift) else u


def filled(part: Tensor) -> Tensor:
    """Chains, or what goes with each, of a batch: fewer than ``FEWEST`` are filled up by repeating the last."""
    return part if len(part) >= FEWEST else part[torch.arange(FEWEST, device=part.device).clamp(max=len(part) - 1)]


def _gradient(energy_fn: Callable[..., Tensor], u: Tensor, y: Tensor | None, batch_size: int | None) -> tuple[Tensor, Tensor]:
    """Energies, shape (B,), and their gradient, of the shape of ``u``; both detached."""
    found, gradients = [], []
    size = len(u) if batch_size is None else max(batch_size, FEWEST)
    for start in range(0, len(u), size):
        part, labels = u[start : start + size].detach(), None if y is None else y[start : start + size]
        count = len(part)
        if batch_size is not None:
            part, labels = filled(part), None if labels is None else filled(labels)
        part.requires_grad_(True)
        args = (part,) if labels is None else (part, labels)
        energies, gradient = energy_fn(*args), None
        if isinstance(energies, Tensor) and energies.shape == part.shape[:1] and energies.requires_grad:
            (gradient,) = torch.autograd.grad(energies.sum(), part, allow_unused=True)
        if gradient is None:
            raise InputError(
                f"energy_fn gives {kind(energies)} for {len(part)} chains: give energies of shape ({len(part)},), with the "
                "graph that leads to the chains"
            )
        found.append(energies.detach()[:count])
        gradients.append(gradient[:count])
    return (found[0], gradients[0]) if len(gradients) == 1 else (torch.cat(found), torch.cat(gradients))
