"""What a page answers: requests that it makes itself, and no others that Gradio would."""

import json
import os
import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

__all__ = ["Gate", "for_this_machine"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_API = "/gradio_api"
_GET = re.compile(
    rf"/|/config/?|/theme\.css|/favicon\.ico|/robots\.txt|/manifest\.json|/(?:assets|static)/[\w./@+-]+"
    rf"|{_API}/(?:startup-events|app_id|queue/data|heartbeat/\w+)"
)
_POST = re.compile(rf"{_API}/(?:queue/join|cancel|reset)/?")
_HERE = ("localhost", "127.0.0.1", "::1")
_SCALARS = (str, int, float, bool, type(None))


def for_this_machine(host: str | None, share: bool) -> bool:
    """Whether a page that is served at ``host`` is for this machine alone."""
    elsewhere = share or any(name in os.environ for name in ("SPACE_ID", "GRADIO_SERVER_NAME", "GRADIO_SHARE"))
    return host in (None, *_HERE) and not elsewhere


class Gate:
    """ASGI middleware in front of Gradio: uploads to its disk, files from there, proxies and the rest are not found.

    What a visitor sends is JSON of at most ``most`` bytes, whose arguments are texts and numbers: Gradio takes other values
    for files on its disk, or to be fetched from addresses within them.

    Args:
        app: what is behind it.
        most: bytes of a request.
        local: the page is for this machine alone. Requests by another host's name, and those of other pages, are refused:
            any site that is open in the same browser could send them.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], most: int, *, local: bool = False) -> None:
        self.app, self.most, self.local = app, most, local

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if self.local and not _from_here(scope["headers"]):
                return await _refuse(send, 403, "this page is for its own machine alone: open it as localhost, or give --host")
            method, path = scope["method"], scope["path"].removeprefix(scope.get("root_path", ""))
            if method in ("GET", "HEAD") and _GET.fullmatch(path) and ".." not in path:
                return await self.app(scope, receive, send)
            if method != "POST" or not _POST.fullmatch(path):
                return await _refuse(send, 404, "not found")
            body = await self._body(receive)
            if body is None:
                return await _refuse(send, 413, f"more than {self.most:,} bytes")
            if not _plain(body):
                return await _refuse(send, 400, "arguments are texts and numbers")
            return await self.app(scope, _replayed(body, receive), send)
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        return None  # no sockets

    async def _body(self, receive: Receive) -> bytes | None:
        parts, size = [], 0
        while True:
            message = await receive()
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.most:
                return None
            if not message.get("more_body", False):
                return b"".join(parts)


def _from_here(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether the host asked, and the page that asks where a browser says which, are this machine by name."""
    named = {name: value.decode("latin-1") for name, value in headers if name in (b"host", b"origin")}
    try:
        host = urlsplit(f"//{named.get(b'host', '')}").hostname
        origin = urlsplit(named[b"origin"]).hostname if b"origin" in named else host
    except ValueError:
        return False
    return host in _HERE and origin in _HERE


def _plain(body: bytes) -> bool:
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return False
    if not isinstance(request, dict):
        return False
    data, event = request.get("data") or [], request.get("event_data") or {}
    if not isinstance(data, list) or not isinstance(event, dict):
        return False
    return all(isinstance(value, _SCALARS) for value in (*data, *event.values()))


def _replayed(body: bytes, receive: Receive) -> Receive:
    rest = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return rest.pop() if rest else await receive()

    return again


async def _refuse(send: Send, status: int, reason: str) -> None:
    text = reason.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"%d" % len(text))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text})
