import signal
import sys

import pytest

from timm_jem.stability.jobs import Job, Pool, last_line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it said nothing"),
        ("one\n\ntwo\n", "two"),
        ("error: no space\n[rank0]: more\n", "error: no space"),
        ("10%\r20%\rtorch.OutOfMemoryError: all of it\n  trailing", "torch.OutOfMemoryError: all of it"),
    ],
)
def test_the_last_word_is_an_error_or_the_last_line(tmp_path, text, said):
    (tmp_path / "log").write_text(f"error: of an earlier try\n{text}", newline="")
    assert last_line(tmp_path / "log", len("error: of an earlier try\n")) == said


def test_each_job_ends_once_with_its_status(tmp_path):
    ended = {}
    before = signal.getsignal(signal.SIGTERM)

    def job(name: str, code: str) -> Job:
        return Job([sys.executable, "-c", code], tmp_path / name / "log", lambda *end: ended.setdefault(name, end) and name)

    jobs = [job("good", "print('done')"), job("bad", "import sys; sys.exit('error: no')"), job("quiet", "")]
    assert Pool(2).run(jobs) is None
    assert ended == {"good": (0, "done"), "bad": (1, "error: no"), "quiet": (0, "it said nothing")}
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_breaks_here_leaves_no_process_behind(tmp_path):
    """The first job's end breaks, while the second would go on for a minute."""

    def broken(code: int, line: str) -> str:
        raise ZeroDivisionError

    wait = Job([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "wait", broken)
    pool = Pool(2)
    with pytest.raises(ZeroDivisionError):
        pool.run([Job([sys.executable, "-c", ""], tmp_path / "log", broken), wait])
    (process,) = pool._running
    assert process.wait(10) == -signal.SIGKILL
