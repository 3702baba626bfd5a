"""Work in a thread of its own whose steps a reader watches, and which ends when the reader leaves."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["Live"]

_ENDED = object()
_GLANCE = 0.1  # seconds after which work that waits for its reader looks whether there is still one


class _Left(Exception):
    """The reader has left."""


class Live:
    """Iterates over the steps that ``work`` reports, which is never more than one ahead; ``result`` is what it returned.

        with Live(lambda report: jem.sample(4, on_step=report)) as steps:
            for step, u in steps:
                ...

    However the context is left, the work ends at its next step, and has ended when the context has. What it raises is
    raised by the iteration.

    Args:
        work: called with a function ``report(*step)``, which waits until the reader takes the step.
    """

    def __init__(self, work: Callable[[Callable[..., None]], Any]) -> None:
        self.result: Any = None
        self._error: BaseException | None = None
        self._steps: queue.Queue = queue.Queue(maxsize=1)
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(work,), name="live", daemon=True)

    def __enter__(self) -> "Live":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._left.set()
        self._thread.join()

    def __iter__(self) -> Iterator[tuple]:
        while (step := self._steps.get()) is not _ENDED:
            yield step
        if self._error is not None:
            raise self._error

    def _run(self, work: Callable[[Callable[..., None]], Any]) -> None:
        try:
            try:
                self.result = work(lambda *step: self._put(step))
            except _Left:
                raise
            except BaseException as error:
                self._error = error
            self._put(_ENDED)
        except _Left:
            pass

    def _put(self, step: Any) -> None:
        while not self._left.is_set():
            try:
                self._steps.put(step, timeout=_GLANCE)
            except queue.Full:
                continue
            return
        raise _Left
