import io

from timm_jem.progress import tqdm


def shown(monkeypatch, value):
    if value is None:
        monkeypatch.delenv("TQDM_DISABLE", raising=False)
    else:
        monkeypatch.setenv("TQDM_DISABLE", value)
    out = io.StringIO()
    with tqdm(range(3), desc="chains", file=out) as bar:
        assert list(bar) == [0, 1, 2]
        bar.write("a line", file=out)
    return out.getvalue()


def test_bars_can_be_left_out_and_lines_stay(monkeypatch):
    assert "chains" in shown(monkeypatch, None)
    assert shown(monkeypatch, "1") == "a line\n"
