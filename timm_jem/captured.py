"""Energies and their gradients as one CUDA graph: a small network's passes wait for launches more than for the GPU."""

import contextlib
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from timm_jem.errors import one_line

__all__ = ["CapturedEnergy"]

_WARM_UP = 3  # passes before a capture, as torch.cuda.graphs asks: libraries set themselves up
_FARTHEST = 0.01  # relative error of a replayed gradient: bf16 kernels may add in another order


class CapturedEnergy:
    """An energy function on a GPU whose forward and input-backward are launched in one go.

    The first call with chains of a shape captures the passes, and compares what they give with the plain ones. Chains are the
    same as without, up to what a kernel's order of summation makes. Where the passes can't be captured, a warning says why
    once, and ``energy_fn`` is called as it is from then on. Noise and steps are not part of the graph, so that generators,
    step sizes and numbers of steps stay free.

    A graph reads weights where they were, in the modes and precision in which they were: change them in place, and nothing
    else, and replace no tensor that a module keeps. It holds the memory of its passes.

    Args:
        energy_fn: ``energy_fn(u)``, or ``energy_fn(u, y)``, to energies of shape (B,), without randomness.
    """

    def __init__(self, energy_fn: Callable[..., Tensor]) -> None:
        self._energy_fn, self._graphs = energy_fn, {}

    def __call__(self, u: Tensor, *labels: Tensor) -> Tensor:
        """Energies, shape (B,), with a graph that leads to ``u`` and can be gone back through once."""
        key = (u.shape, u.stride(), u.dtype, len(labels))
        if key not in self._graphs:
            try:
                self._graphs[key] = _Graph(self._energy_fn, u, *labels)
            except RuntimeError as error:
                why = f"chains are not captured as a CUDA graph ({one_line(error)}): they run as they are"
                warnings.warn(why, stacklevel=2)
                self._graphs[key] = None
        graph = self._graphs[key]
        return self._energy_fn(u, *labels) if graph is None else _Replay.apply(graph, u, *labels)


class _Graph:
    """The captured passes for chains of one shape."""

    def __init__(self, energy_fn: Callable[..., Tensor], u: Tensor, *labels: Tensor) -> None:
        if u.device.type != "cuda":
            raise RuntimeError(f"they are on {u.device.type}")
        self._inputs = [u.detach().clone().requires_grad_(True), *(y.clone() for y in labels)]
        aside, main = torch.cuda.Stream(u.device), torch.cuda.current_stream(u.device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(u.device), torch.cuda.stream(main):  # which a capture that fails would leave
            aside.wait_stream(main)
            with torch.cuda.stream(aside):
                for _ in range(_WARM_UP):
                    plain = self._passes(energy_fn)
                with _no_waiting():
                    self._passes(energy_fn)
            main.wait_stream(aside)
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):  # other threads may copy images meanwhile
                self._outputs = self._passes(energy_fn)
        self._graph.replay()
        for replayed, expected in zip(self._outputs, plain, strict=True):
            if not (replayed - expected).norm() <= _FARTHEST * expected.norm():  # NaN included
                raise RuntimeError("a replay differs from the plain passes")

    def _passes(self, energy_fn: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        energies = energy_fn(*self._inputs)
        (gradient,) = torch.autograd.grad(energies.sum(), self._inputs[0])
        return energies.detach(), gradient

    @torch.no_grad()
    def replay(self, *inputs: Tensor) -> list[Tensor]:
        """Energies and gradients of ``inputs``, new tensors."""
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._graph.replay()
        return [output.clone() for output in self._outputs]


@contextlib.contextmanager
def _no_waiting() -> Iterator[None]:
    """Within the context what waits for the GPU raises a RuntimeError; in a capture it would break more than that."""
    mode = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, graph: _Graph, u: Tensor, *labels: Tensor) -> Tensor:
        energies, gradient = graph.replay(u, *labels)
        ctx.save_for_backward(gradient)
        ctx.labels = len(labels)
        return energies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return None, gradient * grad.view(-1, *[1] * (gradient.ndim - 1)), *[None] * ctx.labels
