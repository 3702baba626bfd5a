"""Recipes as real processes, forked from a server that has imported what takes most of a short run's time."""

import multiprocessing
import os
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).parent.parent
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["timm_jem.training.finish", "datasets", "sklearn.datasets"])


def launch(command: str, folder: Path) -> subprocess.CompletedProcess:
    """Run an ``accelerate launch`` line as a shell would, in ``folder``."""
    words = [Path(sys.executable).parent / "accelerate", "launch", *shlex.split(command)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)


def start_recipe(
    name: str,
    flags: list[str],
    folder: Path,
    environment: dict[str, str],
    output: Path,
    *,
    fresh: bool = False,
    before: Callable[[], None] | None = None,
) -> BaseProcess:
    """``python recipes/<name>`` in ``folder``, a session of its own, which appends all that it says to ``output``.

    Args:
        fresh: in a new interpreter that has imported nothing, as a shell would start it.
        before: what that process does first.
    """
    process = FORKS.Process(target=_run, args=(ROOT / "recipes" / name, flags, folder, environment, output, fresh, before))
    process.start()
    return process


def exit_status(process: BaseProcess, seconds: float = 300) -> int | None:
    """Once it has one; one that takes longer is killed, and has none."""
    process.join(seconds)
    status = process.exitcode
    process.kill()
    return status


def _run(
    script: Path,
    flags: list[str],
    folder: Path,
    environment: dict[str, str],
    output: Path,
    fresh: bool,
    before: Callable[[], None] | None,
) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ.update(environment)
    said = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(said, sys.stdout.fileno())
    os.dup2(said, sys.stderr.fileno())
    if before is not None:
        before()
    if fresh:
        os.execv(sys.executable, [sys.executable, str(script), *flags])
    sys.argv = [str(script), *flags]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
