"""Models without memory: what a file describes is built on the meta device, within bounds, before it may cost anything."""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["build_empty"]


class _OutOfBoundsError(BaseException):
    """No Exception, so that no constructor takes it for one of its own."""


class _Elements(TorchFunctionMode):
    """Bounds the elements of all tensors that this thread makes, registered with a module or not."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.left = most

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(tensor, Tensor) and not tensor._is_view() and not any(tensor is given for given in args):
                self.left -= tensor.numel()
        if self.left < 0:
            raise _OutOfBoundsError
        return result


def build_empty(build: Callable[[], nn.Module], *, calls: int, elements: int) -> nn.Module | None:
    """``build()`` on the meta device, or None where it goes out of bounds.

    It runs in a thread of its own, whose calls are counted: other threads, their modules and their profilers are left alone.

    Args:
        build: makes a module.
        calls: most calls of functions and returns from them, in Python and C.
        elements: most elements of the tensors that it makes on the way, all together.

    Raises:
        Exception: whatever ``build`` raises.
    """

    def bounded() -> nn.Module | None:
        left = calls

        def count(frame: FrameType, event: str, argument: Any) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise _OutOfBoundsError

        try:
            sys.setprofile(count)
            try:
                with torch.device("meta"), _Elements(elements):
                    return build()
            finally:
                sys.setprofile(None)
        except _OutOfBoundsError:
            return None

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(bounded).result()
