"""Actions of a visitor: pause, resume and end runs, revoke devices, sign in and out.

The rule: the guard has checked that the request comes from this page. Here the visitor has to be one who may
steer. The aggregator then checks once more, by its table of roles, and writes its audit log.
"""

from __future__ import annotations

from typing import Final
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from fedgrpc.calls import Calls
from fedgrpc.claims import Text
from fedgrpc.errors import NotFound, UsageError, WrongIdentity
from fedgrpc.web.guard import MAX_BODY_BYTES
from fedgrpc.web.rendering import in_path
from fedgrpc.web.views import Views
from fedgrpc.web.visitors import COOKIE, LocalVisitors, Visitors

_WHY: Final = Text(200)
_SEE_OTHER: Final = 303


class Actions:
    """Handlers of POST requests; each ends with a redirect to the page that shows what has changed."""

    def __init__(self, views: Views, visitors: Visitors) -> None:
        self._views = views
        self._visitors = visitors

    async def pause(self, request: Request) -> Response:
        """Open no further round."""
        name, client = self._run(request)
        await client.pause()
        return _see(f"/runs/{in_path(name)}")

    async def resume(self, request: Request) -> Response:
        """Open rounds again."""
        name, client = self._run(request)
        await client.resume()
        return _see(f"/runs/{in_path(name)}")

    async def stop(self, request: Request) -> Response:
        """End the run, for the reason of the form, once its name has been typed."""
        name, client = self._run(request)
        fields = await form(request)
        if fields.get("confirm") != name:
            raise UsageError(f"nothing was stopped: type the run's name, {name!r}, to confirm")
        await client.stop(_WHY.cleaned(fields.get("why", "")) or "ended from the page")
        return _see(f"/runs/{in_path(name)}")

    async def revoke(self, request: Request) -> Response:
        """Let a device call no more."""
        worker = request.path_params["worker"]
        client = self._steering(request)
        fields = await form(request)
        why = _WHY.cleaned(fields.get("why", ""))
        if not why:
            raise UsageError("nothing was revoked: say why, for those who read the audit log")
        await client.identities.revoke(worker, why, "drop_updates" in fields)
        return _see(f"/fleet/{in_path(worker)}")

    async def sign_in(self, request: Request) -> Response:
        """Begin a session, with the secret of the sign-in link."""
        visitors = self._local()
        cookie = visitors.sign_in((await form(request)).get("secret", ""))
        response = _see("/runs")
        response.set_cookie(COOKIE, cookie, httponly=True, samesite="strict")
        return response

    async def sign_out(self, request: Request) -> Response:
        """End the session."""
        self._local().sign_out(request.cookies.get(COOKIE, ""))
        response = _see("/runs")
        response.delete_cookie(COOKIE, httponly=True, samesite="strict")
        return response

    def _run(self, request: Request) -> tuple[str, Calls]:
        name = str(request.path_params["run"])
        return name, self._steering(request).of(name)

    def _steering(self, request: Request) -> Calls:
        visitor = self._visitors.visitor(request)
        if not visitor.steers:
            who = f"the {visitor.role} {visitor.name!r}" if visitor.name else "who has not signed in"
            raise WrongIdentity(f"{who} may look, and change nothing")
        return self._views.client_of(visitor)

    def _local(self) -> LocalVisitors:
        if not isinstance(self._visitors, LocalVisitors):
            raise NotFound("there is no such page: visitors are known by their certificates")
        return self._visitors


async def form(request: Request) -> dict[str, str]:
    """Return the fields of a small form. Raises `UsageError`."""
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise UsageError("the form is too long")
    try:
        fields = parse_qs(body.decode(), keep_blank_values=True, max_num_fields=16, strict_parsing=bool(body))
    except ValueError:
        raise UsageError("the body is no form") from None
    return {name: values[-1] for name, values in fields.items()}


def _see(path: str) -> RedirectResponse:
    return RedirectResponse(path, _SEE_OTHER)
