"""The web application: its routes, what guards them, and how errors become pages."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Final

import structlog
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from fedgrpc import errors
from fedgrpc.calls import Calls
from fedgrpc.web.actions import Actions
from fedgrpc.web.guard import Guard
from fedgrpc.web.views import Views
from fedgrpc.web.visitors import Visitor, Visitors

STATIC: Final = Path(__file__).parent / "static"
# The nearest listed ancestor of a class decides, as in `fedgrpc.rpc.status`.
_STATUS: Final[dict[type[errors.FedgrpcError], int]] = {
    errors.FedgrpcError: 500,
    errors.UsageError: 400,
    errors.NotFound: 404,
    errors.UnknownWorker: 404,
    errors.WrongIdentity: 403,
    errors.NotApproved: 403,
    errors.NotEnrolled: 403,
    errors.IllegalTransition: 409,
    errors.RoundClosed: 409,
    errors.Exhausted: 429,
    errors.LinkError: 503,
}

log = structlog.get_logger()


def application(client_of: Callable[[Visitor], Calls], visitors: Visitors, hosts: Collection[str]) -> Starlette:
    """Return the page. `client_of` gives the client for a visitor; `hosts` are the names of the page."""
    views = Views(client_of, visitors)
    actions = Actions(views, visitors)

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, errors.FedgrpcError)
        return views.error(status_of(error), str(error))

    async def not_found(request: Request, error: Exception) -> Response:
        return views.error(404, "there is no such page")

    async def failed(request: Request, error: Exception) -> Response:
        log.error("page failed", path=request.url.path, exc_info=error)
        return views.error(500, "the page failed; the aggregator's log says why")

    handlers: dict[Any, Any] = {errors.FedgrpcError: refused, 404: not_found, 405: not_found, 500: failed}
    return Starlette(
        routes=[*_routes(views, actions), Mount("/static", StaticFiles(directory=STATIC), name="static")],
        middleware=[Middleware(Guard, names=hosts)],
        exception_handlers=handlers,
    )


def _routes(views: Views, actions: Actions) -> list[Route]:
    def post(path: str, endpoint: Any) -> Route:
        return Route(path, endpoint, methods=["POST"])

    # A run's name may have a slash in it, so the longer paths come first.
    return [
        Route("/", views.home),
        Route("/runs", views.runs),
        Route("/runs/{run:path}/series.json", views.series),
        Route("/runs/{run:path}/live", views.live),
        Route("/runs/{run:path}/rounds", views.rounds),
        Route("/runs/{run:path}/rounds/{number:int}", views.round),
        post("/runs/{run:path}/pause", actions.pause),
        post("/runs/{run:path}/resume", actions.resume),
        post("/runs/{run:path}/stop", actions.stop),
        Route("/runs/{run:path}", views.run),
        Route("/fleet", views.fleet),
        post("/fleet/{worker}/revoke", actions.revoke),
        Route("/fleet/{worker}", views.worker),
        Route("/audit", views.audit),
        Route("/sign-in", views.sign_in),
        post("/sign-in", actions.sign_in),
        post("/sign-out", actions.sign_out),
    ]


def status_of(error: errors.FedgrpcError) -> int:
    """Return the HTTP status of a domain error."""
    return next(_STATUS[item] for item in type(error).__mro__ if item in _STATUS)
