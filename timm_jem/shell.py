"""What ends a recipe early reaches the shell as one line, said once, however many processes there are."""

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator

import torch
from accelerate.utils.environment import get_int_from_env
from accelerate.utils.memory import should_reduce_batch_size

from timm_jem.errors import InputError, one_line

__all__ = ["check_one_process", "one_line_errors", "out_of_memory"]

# Seconds that the others leave to the main process, which may be slower to fail; once it has ended, the launcher ends them.
_PATIENCE = 6.0
_RAISED = re.compile(r"timm_jem\.(?:errors\.InputError|decoding\.BrokenImage): ")


@contextlib.contextmanager
def one_line_errors(
    *,
    stopped: str = "interrupted; a run that has a checkpoint goes on with --resume",
    less: str = "lower train.batch_size (train.grad_accum makes up for it), train.buffer_size or data.image_size",
) -> Iterator[None]:
    """Around a recipe's main: people's mistakes, a full disk or memory, and Ctrl-C end in a line; bugs in a traceback.

    Args:
        stopped: what Ctrl-C leaves.
        less: what makes it take less memory.

    Raises:
        SystemExit: with the line.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no text; so has stderr by itself
    try:
        yield
        sys.stdout.flush()  # a pipe whose reader has left
    except InputError as error:
        # One that a loader's process raised comes with that process's traceback, its own line last.
        _leave(_RAISED.split(str(error))[-1].strip(), error)
    except KeyboardInterrupt as error:
        _leave(stopped, error, code=130)
    except (MemoryError, RuntimeError) as error:
        if out_of_memory(error):
            _leave(f"out of memory ({one_line(error)[:120]}): {less}", error)
        if not (torch.distributed.is_initialized() and any(name in str(error).lower() for name in ("gloo", "nccl"))):
            raise
        _leave(f"another process of this run has ended ({one_line(error)}); go on with --resume", error, own=False)
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        _leave(one_line(error), error)


def out_of_memory(error: BaseException) -> bool:
    """Whether less work at once would not have met it."""
    return isinstance(error, MemoryError) or should_reduce_batch_size(error)


def check_one_process(what: str) -> None:
    """Raise an InputError where a launcher started several processes, which would all do the same."""
    # Asked of the launcher's variables: without a GPU, accelerate takes each of torchrun's processes for the only one.
    processes = get_int_from_env(["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"], 1)
    if processes > 1:
        raise InputError(f"{what} runs in one process, not in {processes}: start it with plain python")


def _leave(line: str, error: BaseException, *, own: bool = True, code: int = 1) -> None:
    """End this process; ``own``: the line tells of itself, and not of what another one did."""
    line = f"error: {line}"
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if int(os.environ.get("RANK", 0)) or not own:
            time.sleep(_PATIENCE)
        if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # the launcher's own report then ends with the line
            with open(report, "w", encoding="utf-8") as file:
                json.dump({"message": {"message": line, "extraInfo": {"timestamp": int(time.time())}}}, file)
    try:
        sys.stdout.flush()
    except OSError:  # Python would try again at its end, and add lines of its own
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    print(line, file=sys.stderr, flush=True)
    raise SystemExit(code) from error
