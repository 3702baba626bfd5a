"""The page answers its own requests and no others."""

import asyncio
import json

import pytest

from timm_jem.demo.gate import Gate, for_this_machine

MOST = 1000


def answer(
    method: str, path: str, body: bytes = b"", *, pieces: int = 1, kind: str = "http", root: str = "", local: dict | None = None
) -> tuple:
    """The status, and the bodies that reached what is behind the gate."""
    reached, sent = [], []

    async def behind(scope, receive, send):
        message = await receive()
        reached.append(message["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    size = -(-len(body) // pieces) or 1
    parts = [body[i : i + size] for i in range(0, len(body), size)] or [b""]
    rest = [{"type": "http.request", "body": part, "more_body": i < len(parts) - 1} for i, part in enumerate(parts)]

    async def receive():
        return rest.pop(0) if rest else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    headers = [(name.encode(), value.encode()) for name, value in (local or {}).items()]
    scope = {"type": kind, "method": method, "path": root + path, "root_path": root, "headers": headers}
    asyncio.run(Gate(behind, MOST, local=local is not None)(scope, receive, send))
    return (sent[0]["status"] if sent else None), reached


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/config", "/theme.css", "/assets/index-Di_Evv.css", "/static/fonts/System/Regular.woff2"),
        *("/gradio_api/queue/data", "/gradio_api/heartbeat/1a3ws7pd60o", "/gradio_api/startup-events", "/gradio_api/app_id"),
    ],
)
def test_what_the_page_asks_for_is_answered(path):
    assert answer("GET", path)[0] == 200
    assert answer("GET", path, root="/user/space")[0] == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(
            ("GET", f"/gradio_api/{path}")
            for path in ("file=/etc/passwd", "file/etc/passwd", "proxy=https://example.org/", "info")
        ),
        *(("GET", path) for path in ("/assets/../../etc/passwd", "/static/..%2f..%2fetc/passwd", "/assets/", "/monitoring")),
        *(
            ("GET", path)
            for path in ("/gradio_api/stream/a/1/2/playlist.m3u8", "/gradio_api/deep_link", "//etc/passwd", "/docs")
        ),
        *(("POST", f"/gradio_api/{path}") for path in ("upload", "run/predict", "call/predict", "stream/1", "vibe-edit")),
        *(("POST", path) for path in ("/", "/login", "/gradio_api/queue/joined", "/gradio_api/queue/join/../../upload")),
        *(("PUT", "/"), ("DELETE", "/"), ("OPTIONS", "/gradio_api/upload"), ("HEAD", "/gradio_api/file=/etc/passwd")),
    ],
)
def test_all_else_is_not_found(method, path):
    assert answer(method, path, b"{}") == (404, [])


def test_a_request_arrives_as_it_was_sent():
    body = json.dumps({"data": [None, 3, "0101", 1.5, True], "event_data": {"row": 3}, "fn_index": 2, "session_hash": "a"})
    for pieces in (1, 7):
        assert answer("POST", "/gradio_api/queue/join", body.encode(), pieces=pieces) == (200, [body.encode()])


@pytest.mark.parametrize("pieces", [1, 10])
def test_a_long_request_is_refused(pieces):
    body = json.dumps({"data": ["a" * MOST]}).encode()
    assert answer("POST", "/gradio_api/queue/join", body, pieces=pieces) == (413, [])


FILE = {"path": "http://127.0.0.1/secret", "meta": {"_type": "gradio.FileData"}}


@pytest.mark.parametrize(
    "request_",
    [
        {"data": [FILE]},
        {"data": [[FILE]]},
        {"data": {"a": FILE}},
        {"data": [None], "event_data": {"file": FILE}},
        {"data": [None], "event_data": [FILE]},
        {"data": [["a"]]},
        {"data": "text"},
        [FILE],
        "text",
        None,
    ],
)
def test_arguments_are_texts_and_numbers(request_):
    """Others may name files, or addresses that Gradio would fetch."""
    assert answer("POST", "/gradio_api/queue/join", json.dumps(request_).encode()) == (400, [])


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[" * 900, b'{"data": [' + b"[" * 400])
def test_what_is_no_json_is_refused(body):
    assert answer("POST", "/gradio_api/queue/join", body) == (400, [])


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "127.0.0.1:7860"}, 200),
        ({"host": "localhost:7860", "origin": "http://localhost:7860"}, 200),
        ({"host": "[::1]:7860", "origin": "http://[::1]:7860"}, 200),
        ({"host": "evil.example:7860"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": "127.0.0.1:7860", "origin": "https://evil.example"}, 403),
        ({"host": "127.0.0.1:7860", "origin": "null"}, 403),
        ({"host": "[::1"}, 403),
        ({}, 403),
    ],
)
def test_a_page_for_this_machine_answers_no_other_site(headers, status):
    assert answer("GET", "/", local=headers)[0] == status
    assert answer("POST", "/gradio_api/queue/join", b"{}", local=headers)[0] == status


@pytest.mark.parametrize(
    ("host", "share", "variable", "local"),
    [
        *((host, False, None, True) for host in (None, "127.0.0.1", "localhost", "::1")),
        *((host, False, None, False) for host in ("0.0.0.0", "::", "192.168.0.2", "")),
        *((None, share, variable, False) for share, variable in ((True, None), (False, "SPACE_ID"), (False, "GRADIO_SHARE"))),
    ],
)
def test_this_machine_by_any_of_its_names_is_this_machine_alone(host, share, variable, local, monkeypatch):
    for name in ("SPACE_ID", "GRADIO_SERVER_NAME", "GRADIO_SHARE"):
        monkeypatch.delenv(name, raising=False)
    if variable is not None:
        monkeypatch.setenv(variable, "1")
    assert for_this_machine(host, share) is local


def test_sockets_stay_closed():
    assert answer("GET", "/", kind="websocket") == (None, [])
