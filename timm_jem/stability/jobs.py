"""Commands as processes of their own, a few at a time."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from timm_jem.progress import tqdm

__all__ = ["Job", "Pool", "last_line"]


@dataclass(frozen=True)
class Job:
    """A command.

    Attributes:
        command: its words.
        log: file that its output is appended to; the folder is made.
        ended: called with its exit status and :func:`last_line`, unless a signal ended the pool; returns a line to show.
    """

    command: Sequence[str]
    log: Path
    ended: Callable[[int, str], str]


class Pool:
    """Runs jobs, ``size`` at a time. SIGTERM and SIGINT are passed on to them, and then no more are started."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._running: dict[subprocess.Popen, tuple[Job, int]] = {}
        self._caught: list[int] = []

    def run(self, jobs: Sequence[Job]) -> int | None:
        """Run all of ``jobs``; returns the number of the signal that ended it early, or None. From the main thread only."""
        waiting, passed_on = list(jobs), 0
        before = {number: signal.signal(number, self._catch) for number in (signal.SIGTERM, signal.SIGINT)}
        progress = tqdm(total=len(jobs), desc="runs", unit="run")
        try:
            while self._running or (waiting and not self._caught):
                while waiting and len(self._running) < self.size and not self._caught:
                    self._start(waiting.pop(0))
                time.sleep(0.1)
                for number in self._caught[passed_on:]:
                    passed_on += 1
                    self._signal(number)
                for process in [process for process in self._running if process.poll() is not None]:
                    job, start = self._running.pop(process)
                    if not self._caught:
                        progress.write(job.ended(process.returncode, last_line(job.log, start)), file=sys.stderr)
                        progress.update()
        finally:
            progress.close()
            self._signal(signal.SIGKILL)  # any that are left, where something here broke
            for number, handler in before.items():
                signal.signal(number, handler)
        return self._caught[0] if self._caught else None

    def _catch(self, number: int, _) -> None:
        self._caught.append(number)

    def _start(self, job: Job) -> None:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("ab") as log:
            start = log.seek(0, os.SEEK_END)
            process = subprocess.Popen(
                job.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Logs keep lines, not bars; unbuffered, the last line is what was written last.
                env={**os.environ, "TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1"},
                start_new_session=True,  # the terminal's Ctrl-C reaches it once, through this process
            )
        self._running[process] = (job, start)

    def _signal(self, number: int) -> None:
        for process in self._running:
            if process.poll() is None:
                os.killpg(process.pid, number)


def last_line(log: Path, start: int) -> str:
    """A job's last word: the last line since byte ``start`` of its log that reports an error, or else the last of all."""
    with log.open("rb") as file:
        file.seek(start)
        lines = [line.strip() for line in re.split(r"[\r\n]+", file.read().decode(errors="replace")) if line.strip()]
    errors = [line for line in lines if re.match(r"error: |[\w.]+(Error|Exception|Interrupt)\b", line)]
    return (errors or lines or ["it said nothing"])[-1]
