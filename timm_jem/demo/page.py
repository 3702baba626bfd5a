"""The page itself, in Gradio: which panel shows what, and what is called when something is pressed.

Pictures come and go as data within messages, never as files: see :mod:`timm_jem.demo.gate`. What belongs to a visitor is in
Gradio's per-session state, and all else is the same for all.
"""

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from torch import Tensor

from timm_jem.demo import panels, views
from timm_jem.demo.exhibit import Exhibit
from timm_jem.demo.gate import Gate, for_this_machine
from timm_jem.errors import InputError

__all__ = ["build", "launch"]

_WAITING = 100  # requests in the queue; more are told to come back later
_ANY = -1  # class
_AT_ONCE = 2  # chains that move at once
_VISITORS = 200  # whose pictures are kept, at most some megabytes each


def launch(
    exhibit: Exhibit,
    *,
    host: str | None = None,
    port: int | None = None,
    share: bool = False,
    open_browser: bool = False,
    wait: bool = True,
) -> gr.Blocks:
    """Serve the page.

    Args:
        exhibit: what it is about.
        host, port: where; None: this machine alone, the first free port from 7860 on.
        share: also a public link, by Gradio's tunnel.
        open_browser: show it at once.
        wait: until Ctrl-C.

    Returns:
        What is served, at its ``local_url``; ``close()`` ends it.

    Raises:
        OSError: there is no such host, or its port is taken.
    """
    # A file grows by a third as text.
    gate = Middleware(Gate, most=panels.MOST_BYTES * 4 // 3 + 2**20, local=for_this_machine(host, share))
    page = build(exhibit)
    page.launch(
        server_name=host,
        server_port=port,
        share=share,
        inbrowser=open_browser,
        app_kwargs={"middleware": [gate]},
        css=_read("page.css"),
        theme=gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        pwa=False,
        state_session_capacity=_VISITORS,
        prevent_thread_lock=not wait,
        quiet=not wait,
    )
    return page


def build(exhibit: Exhibit) -> gr.Blocks:
    """The page, not yet served."""
    first = exhibit.examples[:1] if len(exhibit.examples) else None
    title = f"What {exhibit.name} believes"
    with gr.Blocks(title=title, analytics_enabled=False) as page:
        picture = gr.State(first)
        _html(f'<div class="title"><h1>{views.text(title)}</h1><p>{views.text(exhibit.about)}</p></div>')
        believed = _html(panels.look(exhibit, first), elem_id="believed")
        said = _html(elem_id="said")
        chooser = _html(panels.chooser(exhibit), js_on_load=_read("chooser.js"), most=panels.MOST_BYTES, elem_id="chooser")
        with gr.Tabs():
            _draw_tab(exhibit)
            tabs = [tab(exhibit, picture) for tab in (_attack_tab, _change_tab, _erase_tab)]
        renewed = {component: value for tab in tabs for component, value in tab.renewed.items()}

        def shown(choose: Callable[[], Tensor]) -> dict[Any, Any]:
            """Another picture, and nothing that was about the one before; or why there is none."""
            try:
                x = choose()
            except InputError as error:
                return {said: views.problem(error)}
            return {picture: x, believed: panels.look(exhibit, x), said: "", **{c: value(x) for c, value in renewed.items()}}

        def choose_example(event: gr.EventData) -> dict[Any, Any]:
            return shown(lambda: panels.example(exhibit, event._data or {}))

        def choose_file(event: gr.EventData) -> dict[Any, Any]:
            return shown(lambda: panels.uploaded(exhibit, event._data or {}))

        options = {
            "outputs": [picture, believed, said, *renewed],
            "cancels": [tab.event for tab in tabs],
            "show_progress": "hidden",
            "api_visibility": "private",
        }
        chooser.select(choose_example, **options)
        chooser.upload(choose_file, **options)
    return page.queue(max_size=_WAITING, default_concurrency_limit=_AT_ONCE)


@dataclass(frozen=True)
class _Tab:
    """What goes on in a tab about a picture.

    Attributes:
        event: what moves in it.
        renewed: what another picture changes, and to what.
    """

    event: Any
    renewed: dict[Any, Callable[[Tensor], Any]]


def _draw_tab(exhibit: Exhibit) -> None:
    def draw(y: int | None, count: int) -> Iterator[str]:
        return panels.draw(exhibit, None if y == _ANY else y, count, secrets.randbelow(2**32))

    with gr.Tab("Draw"):
        _html(panels.begun(exhibit))
        with gr.Row():
            y = gr.Dropdown([("whatever it likes", _ANY), *_classes(exhibit)], value=0, label="What to draw")
            count = gr.Slider(1, panels.MOST_DRAWN, panels.drawn_at_once(exhibit), step=1, label="How many")
        _action("Draw", draw, [y, count], "drawn")


def _attack_tab(exhibit: Exhibit, picture: gr.State) -> _Tab:
    def attack(x: Tensor | None, levels: int) -> Iterator[str]:
        return panels.attack(exhibit, _there(x), levels)

    with gr.Tab("Attack"):
        _html(views.note("Every pixel moves a little, the way that changes the model's mind soonest."))
        levels = gr.Slider(
            1, panels.MOST_LEVELS, panels.levels_moved(exhibit), step=1, label="How far a pixel may move, of 255 grey levels"
        )
        event, attacked = _action("Attack", attack, [picture, levels], "attacked")
    return _Tab(event, {attacked: lambda x: ""})


def _change_tab(exhibit: Exhibit, picture: gr.State) -> _Tab:
    def change(x: Tensor | None, y: int) -> Iterator[tuple[Any, ...]]:
        for shown in panels.change(exhibit, _there(x), y):
            if isinstance(shown, str):
                yield shown, None, gr.Slider(interactive=False)
            else:
                last = len(shown) - 1
                yield shown[last], shown, gr.Slider(maximum=max(last, 1), value=last, interactive=True)

    with gr.Tab("Change"):
        _html(views.note("The least change after which the model is sure that it sees another class."))
        y = gr.Dropdown(_classes(exhibit), value=min(1, len(exhibit.names) - 1), label="What it is to become")
        way = gr.State(None)
        along = gr.Slider(0, 1, 1, step=1, label="Along the way", interactive=False, render=False, elem_id="along")
        event, changed = _action("Change", change, [picture, y], "changed", [way, along])
        along.render()
        look_back = {"show_progress": "hidden", "trigger_mode": "always_last", "api_visibility": "private"}
        along.input(panels.frame, [way, along], changed, **look_back)
    return _Tab(event, {changed: lambda x: "", way: lambda x: None, along: lambda x: gr.Slider(interactive=False)})


def _erase_tab(exhibit: Exhibit, picture: gr.State) -> _Tab:
    def restore(x: Tensor | None, cells: str) -> Iterator[str]:
        return panels.restore(exhibit, _there(x), cells, secrets.randbelow(2**32))

    with gr.Tab("Erase and restore"):
        _html(views.note("Paint over a part of the picture. A chain fills it in with what the model takes for likely there."))
        canvas = panels.canvas(exhibit, picture.value)
        options = {"html_template": "${canvas}", "js_on_load": _read("painter.js"), "elem_id": "painter"}
        painter = _html(canvas=canvas, **options)  # its value is what is painted
        event, restored = _action("Restore", restore, [picture, painter], "restored")
    return _Tab(event, {painter: lambda x: gr.HTML(canvas=panels.canvas(exhibit, x)), restored: lambda x: ""})


def _action(name: str, panel: Callable, inputs: list, result: str, more: Sequence = ()) -> tuple[Any, gr.HTML]:
    """A button that begins, one that stops, and where each step is shown; ``more``: what else a step changes."""
    with gr.Row():
        start, stop = gr.Button(name, variant="primary"), gr.Button("Stop")
    shown = _html(elem_id=result)

    def moving(*given: Any) -> Iterator[Any]:
        try:
            yield from panel(*given)
        except InputError as error:
            yield {shown: views.problem(error)}

    options = {"show_progress": "minimal", "concurrency_id": "chains", "concurrency_limit": _AT_ONCE}
    event = start.click(moving, inputs, [shown, *more], api_visibility="private", **options)
    stop.click(None, cancels=[event])
    return event, shown


def _html(value: str = "", **options: Any) -> gr.HTML:
    return gr.HTML(value, apply_default_css=False, **options)


def _there(x: Tensor | None) -> Tensor:
    if x is None:
        raise InputError("there is no picture yet: upload one, or drop it here")
    return x


def _classes(exhibit: Exhibit) -> list[tuple[str, int]]:
    return [(name, i) for i, name in enumerate(exhibit.names)]


def _read(name: str) -> str:
    return (files("timm_jem.demo") / name).read_text(encoding="utf-8")
