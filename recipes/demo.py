"""A page in the browser: what a model believes of a picture, what it draws, and what changes its mind.

    python recipes/demo.py runs/digits                                             # a run, a saved folder or a Hub name
    python recipes/demo.py timm:resnet18.a1_in1k --data.dataset ./photos           # any timm model, with pictures to begin with
    python recipes/demo.py runs/digits --space ./space                             # a folder that runs as a Hugging Face Space

The page is for this machine alone, unless --host or --share says otherwise. Ctrl-C ends it. As app.py of a Space this file
shows the model in the folder "model" beside it.
"""

import socket
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState

from timm_jem import InputError
from timm_jem.command_line import make_parser, parse_flags, read_flags, told_of, with_contents
from timm_jem.data import DataConfig
from timm_jem.demo.exhibit import Exhibit, load_exhibit
from timm_jem.demo.space import write_space
from timm_jem.errors import check_whole, need, one_line
from timm_jem.heap import keep_freed_memory
from timm_jem.shell import check_one_process, one_line_errors

BESIDE = Path(__file__).parent / "model"


def parse(argv: list[str]) -> tuple[Any, dict[str, Any]]:
    parser = make_parser("demo", __doc__.splitlines()[0])
    parser.add_argument("model", type=str | None, nargs="?", help="a run, a saved folder, a Hub name, or timm:NAME")
    parser.add_argument(
        "--data",
        type=DataConfig | None,
        default=None,
        help="pictures, by --data.dataset NAME and others (--data.help lists them); default: as in the model's training",
    )
    parser.add_argument("--host", type=str | None, default=None, help="0.0.0.0: for all machines; default: for this one alone")
    parser.add_argument("--port", type=int | None, default=None, help="default: the first free one from 7860 on")
    parser.add_argument("--share", type=bool, default=False, help="also a public link, by Gradio's tunnel and servers")
    parser.add_argument("--open_browser", type=bool, default=True, help="show the page at once")
    parser.add_argument("--space", type=str | None, default=None, help="serve nothing, and write a Space to this new folder")
    flags = with_contents(parser, read_flags(parser, argv))
    given = parse_flags(parser, flags)
    check_address(given.host, given.port)
    return given, told_of(parser, flags, "data", given.data)


def check_address(host: str | None, port: int | None) -> None:
    """Raise an InputError, before any work, unless a page can be served there."""
    if port is not None:
        check_whole("port", port, 1, 65535)
    family = socket.AF_INET6 if host and ":" in host else socket.AF_INET
    try:
        socket.create_server((host or "127.0.0.1", port or 0), family=family).close()
    except (OSError, UnicodeError) as error:
        where = f"{host or '127.0.0.1'}{f', port {port}' if port else ''}"
        raise InputError(f"a page can't be served at {where} ({one_line(error)}): give another --host or --port") from error


def serve(exhibit: Exhibit, given: Any) -> None:
    """Until Ctrl-C."""
    from timm_jem.demo.page import launch

    launch(exhibit, host=given.host, port=given.port, share=given.share, open_browser=given.open_browser)


def main(argv: list[str]) -> None:
    given, told = parse(argv)
    check_one_process("a page")
    name = given.model or (str(BESIDE) if BESIDE.is_dir() else None)
    if name is None:
        raise InputError("which model? Give a run, a saved folder, a Hub name or timm:NAME; --help says more")
    if given.space is None:
        need("gradio", "the page", "demo")
    exhibit, instead = load_exhibit(name, told, device=PartialState().device)
    if instead:
        print(f"note: {instead}", flush=True)
    if given.space is not None:
        write_space(exhibit.jem, given.space, title=f"What {exhibit.name} believes", app=Path(__file__))
        print(f"a Space is in {given.space}: look at its README.md")
        return
    keep_freed_memory()
    serve(exhibit, given)


if __name__ == "__main__":
    with one_line_errors(stopped="the page is closed", less="give a smaller model"):
        main(sys.argv[1:])
