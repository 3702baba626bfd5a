"""What is due at a step, and the signals that end a run early."""

import contextlib
import math
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from accelerate import Accelerator
from accelerate.utils import gather_object

from timm_jem.training.settings import Settings

__all__ = ["Cadence", "Due", "stop_signals"]

_PATIENCE = 5.0  # seconds


@dataclass(frozen=True)
class Due:
    """What a step asks for.

    Attributes:
        look: the guard judges the steps since its last look.
        log, sample, validate, push: a line of metrics, pictures, validation, publishing.
        checkpoint, snapshot: a state on disk, or one in memory to go back to.
        stop: the signal that ends the run here, or None.
    """

    look: bool = False
    log: bool = False
    sample: bool = False
    validate: bool = False
    push: bool = False
    checkpoint: bool = False
    snapshot: bool = False
    stop: signal.Signals | None = None

    def __bool__(self) -> bool:
        return any(vars(self).values())


class Cadence:
    """When a run looks, logs, draws, validates, publishes and saves: by its settings, the same in all processes."""

    def __init__(self, settings: Settings, accelerator: Accelerator) -> None:
        self.settings, self.accelerator = settings, accelerator
        self._asked: tuple[int, float] | None = None  # at which step, and when
        self._ask_at = 0

    def at(self, step: int, signals: Sequence[signal.Signals]) -> Due:
        """What is due after ``step``; ``signals`` are those that this process has caught."""
        train, guard, hub = self.settings.train, self.settings.guard, self.settings.hub

        def every(steps: int) -> bool:
            return steps > 0 and step % steps == 0

        last = step == train.steps
        checkpoint = every(train.checkpoint_every) or last
        validate = every(train.eval_every) or (last and train.best_k > 0)
        push = hub.push_to is not None and every(hub.every) and not last
        # What is kept on disk, and is then all there is to go back to, has been looked at; so has what may be the best, and
        # what is published.
        look = every(guard.check_every) or checkpoint or validate or push
        stop = signals[0] if signals else None
        if self.accelerator.num_processes > 1:
            stop = self._agreed(step, stop) if look or step >= self._ask_at else None
        return Due(
            look=look,
            log=every(train.log_every) or last,
            sample=every(train.sample_every) or push,  # a card shows pictures of its own weights
            validate=validate,
            push=push,
            checkpoint=checkpoint,
            snapshot=every(guard.snapshot_every),
            stop=stop,
        )

    def _agreed(self, step: int, stop: signal.Signals | None) -> signal.Signals | None:
        """The signal that any process has caught: all stop at the same step.

        Agreeing waits for the device, so that they ask one another at looks alone, and, where these are far apart, once in
        ``_PATIENCE`` seconds: a launcher that passes a signal on kills its processes half a minute later.
        """
        now = time.monotonic()
        pace = math.inf if self._asked is None else (now - self._asked[1]) / max(step - self._asked[0], 1)
        stops, paces = zip(*gather_object([(stop, pace)]), strict=True)
        self._asked, self._ask_at = (step, now), step + max(1, int(_PATIENCE / max(*paces, 1e-6)))
        return next((stop for stop in stops if stop is not None), None)


@contextlib.contextmanager
def stop_signals() -> Iterator[list[signal.Signals]]:
    """Within the context SIGTERM and SIGINT ask for an end: the list fills as they come, and a second one ends at once."""
    caught: list[signal.Signals] = []

    def catch(number: int, _) -> None:
        caught.append(signal.Signals(number))
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, catch) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
