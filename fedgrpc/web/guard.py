"""Guard in front of every request: names of this page, origins of changes, sizes, and headers of every answer.

The rule: a request whose Host is no name of this page is refused, since a name of somebody else's may lead here
(DNS rebinding). A request that changes something is refused unless a page of this very origin sent it. No answer
lets a browser load or run anything from elsewhere, or anything that stands inside the text of an answer.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES: Final = 4096
_MAX_URL_BYTES: Final = 4096
_READING: Final = frozenset({"GET", "HEAD"})
_HEADERS: Final = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # Not "no-referrer": with that, browsers send forms with the origin "null".
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
}


def host_of(header: str) -> str:
    """Return the host of a Host header or a network location, in lower case and without its port."""
    host, _, port = header.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()):
        host = header
    return host.strip("[]").rstrip(".").lower()


def same_origin(headers: Headers) -> bool:
    """Return whether a page of this origin sent the request; browsers tell so of all that can change something."""
    if headers.get("sec-fetch-site", "same-origin") != "same-origin":
        return False
    try:
        origin = urlsplit(headers.get("origin", ""))
    except ValueError:
        return False
    # The scheme may differ: a proxy may end TLS in front.
    return origin.scheme in ("http", "https") and origin.netloc.lower() == headers.get("host", "").lower()


class Guard:
    """ASGI middleware that keeps the rule above. `names` are the hosts of this page, in lower case."""

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self._app = app
        self._names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                headers.setdefault("cache-control", "no-store")
            await send(message)

        complaint = self._complaint(scope)
        if complaint is None:
            await self._app(scope, receive, sending)
        else:
            status, text = complaint
            await PlainTextResponse(f"{text}\n", status)(scope, receive, sending)

    def _complaint(self, scope: Scope) -> tuple[int, str] | None:
        """Return the status and the reason of a refusal."""
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or host_of(hosts[0]) not in self._names:
            return 421, "this page has another name; give it with --web-host if browsers are to use this one"
        if len(scope["raw_path"]) + len(scope["query_string"]) > _MAX_URL_BYTES:
            return 414, "the address is too long"
        if scope["method"] in _READING:
            return None
        if scope["method"] != "POST":
            return 405, "only GET and POST"
        if not same_origin(headers):
            return 403, "changes are made from this page alone, not from another site's"
        return None
