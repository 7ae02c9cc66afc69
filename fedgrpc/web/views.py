"""Views of the page: each handler reads through the client of its visitor, and renders one template."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response, StreamingResponse

from fedgrpc.calls import Calls
from fedgrpc.claims import NUMBER, Text
from fedgrpc.errors import FedgrpcError, NotFound, UsageError
from fedgrpc.protocol.durations import duration_from_proto
from fedgrpc.runs.scheduler import PATIENCE_S
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1.identity_pb2 import Member
from fedgrpc.web.fleet import FleetQuery, fleet_page
from fedgrpc.web.reading import AuditTail, Fresh, RoundHistory, past_tasks
from fedgrpc.web.rendering import environment
from fedgrpc.web.rounds import series_of
from fedgrpc.web.visitors import Visitor, Visitors
from fedgrpc.words import ENDED

_FLEET_AGE_S: Final = 2.0
_MEMBERS_AGE_S: Final = 5.0
_LIVE_HZ: Final = 1.0
_QUIET_S: Final = 15.0
_MAX_RUNS: Final = 64
_ROUNDS_SHOWN: Final = 20
_LINES_SHOWN: Final = 100
_RUNS_SHOWN: Final = 3
_RELEASES_SHOWN: Final = 10
_TASKS_SHOWN: Final = 200
_SEARCH: Final = Text(100)

News = pb.WatchRoundsResponse


class Views:
    """Handlers of GET requests, and what they have read. Lives on one event loop."""

    def __init__(self, client_of: Callable[[Visitor], Calls], visitors: Visitors) -> None:
        self.client_of = client_of
        self._visitors = visitors
        self._templates = environment()
        self._fleet: Fresh[Sequence[pb.WorkerRecord]] = Fresh(_FLEET_AGE_S, lambda client: client.workers())
        self._members: Fresh[Sequence[Member]] = Fresh(_MEMBERS_AGE_S, lambda client: client.identities.members())
        self._histories: dict[str, RoundHistory] = {}
        self._audit = AuditTail()

    def error(self, status: int, reason: str) -> Response:
        """Return the page of an error. It shows nothing of the aggregator: its visitor may be anybody."""
        text = self._templates.get_template("error.html").render(
            status=status, reason=reason, visitor=Visitor(), serving=None, signs_in=False, here=""
        )
        return HTMLResponse(text, status)

    async def _page(
        self, request: Request, name: str, visitor: Visitor, client: Calls, values: Mapping[str, Any]
    ) -> Response:
        # Made for every page: the aggregator says whether this visitor may see anything now.
        serving = await client.healthy()
        text = self._templates.get_template(name).render(
            visitor=visitor,
            serving=serving,
            signs_in=self._visitors.signs_in,
            here=request.url.path.split("/")[1],
            **values,
        )
        return HTMLResponse(text)

    def _visit(self, request: Request) -> tuple[Visitor, Calls]:
        visitor = self._visitors.visitor(request)
        return visitor, self.client_of(visitor)

    async def home(self, request: Request) -> Response:
        """Redirect to the runs."""
        return RedirectResponse("/runs")

    async def runs(self, request: Request) -> Response:
        """List the runs."""
        visitor, client = self._visit(request)
        runs = await client.runs()
        values = {"runs": runs[::-1], "queue": queue_of(runs)}
        return await self._page(request, "runs.html", visitor, client, values)

    async def run(self, request: Request) -> Response:
        """Show one run: figures, charts, the round in progress, the last rounds, settings."""
        visitor, client = self._visit(request)
        client = client.of(request.path_params["run"])
        async with aclosing(client.watch()) as watched:  # type: ignore[type-var]
            news = await anext(watched)
        history = await self._history(news.run, client)
        releases = await client.models.releases(news.run.name)
        shown = {"recent": history[: -_ROUNDS_SHOWN - 1 : -1], "earlier": len(history) > _ROUNDS_SHOWN}
        shown["releases"] = releases[:_RELEASES_SHOWN]
        return await self._page(request, "run.html", visitor, client, {**self._live_values(news), **shown})

    async def _history(self, run: pb.Run, client: Calls) -> Sequence[Any]:
        known = self._histories.get(run.name)
        if known is None or known.run_id != run.id:
            while len(self._histories) >= _MAX_RUNS:
                del self._histories[next(iter(self._histories))]
            known = self._histories[run.name] = RoundHistory(run.id)
        return await known.rounds(client)

    async def series(self, request: Request) -> Response:
        """Return what the charts of a run show."""
        _, client = self._visit(request)
        client = client.of(request.path_params["run"])
        run = await client.run()
        return JSONResponse(series_of([each for each in await self._history(run, client) if each.trains]))

    def _live_values(self, news: News) -> dict[str, Any]:
        return {"run": news.run, "round": news.round if news.HasField("round") else None, "now": time.time()}

    async def live(self, request: Request) -> Response:
        """Stream what changes of a run, as events of the server, until it ends."""
        _, client = self._visit(request)
        watched = client.of(request.path_params["run"]).watch(max_rate_hz=_LIVE_HZ)
        # Awaited here, so that a refusal has a status of its own.
        first = await anext(watched)
        return StreamingResponse(self._events(first, watched), media_type="text/event-stream")

    async def _events(self, news: News | None, watched: Any) -> AsyncIterator[str]:
        fragment = self._templates.get_template("live.html")
        async with aclosing(watched):
            while news is not None:
                mark = f"{news.run.phase} {news.round.number} {news.round.phase}"
                told = {
                    "html": fragment.render(**self._live_values(news)),
                    "mark": mark,
                    "ended": news.run.phase in ENDED,
                }
                yield f"data: {json.dumps(told)}\n\n"
                coming = asyncio.ensure_future(anext(watched, None))
                try:
                    while not (await asyncio.wait([coming], timeout=_QUIET_S))[0]:
                        # Something in between may end a connection that says nothing.
                        yield ": still here\n\n"
                    news = coming.result()
                except FedgrpcError:
                    # The browser connects again, and then has the reason as a status.
                    return
                finally:
                    coming.cancel()
                    with suppress(asyncio.CancelledError, FedgrpcError):
                        await coming

    async def rounds(self, request: Request) -> Response:
        """Return rows of rounds below a number: for the table of the run's page."""
        _, client = self._visit(request)
        client = client.of(request.path_params["run"])
        run = await client.run()
        below = _number(request.query_params.get("below", ""))
        history = await self._history(run, client)
        found = [each for each in history if not below or each.number < below]
        shown = found[: -_ROUNDS_SHOWN - 1 : -1]
        text = self._templates.get_template("round_rows.html").render(
            run=run, recent=shown, earlier=len(found) > len(shown)
        )
        return HTMLResponse(text)

    async def round(self, request: Request) -> Response:
        """Show one round with its tasks."""
        visitor, client = self._visit(request)
        client = client.of(request.path_params["run"])
        number = request.path_params["number"]
        if number > NUMBER.most:
            raise NotFound(f"there is no round {str(number)[:20]}")
        run, record = await client.run(), await client.round(number)
        start = _number(request.query_params.get("from", ""))
        values = {"run": run, "record": record, "start": start, "stop": start + _TASKS_SHOWN}
        return await self._page(request, "round.html", visitor, client, values)

    async def fleet(self, request: Request) -> Response:
        """Show a page of the fleet."""
        visitor, client = self._visit(request)
        query = FleetQuery.parse(request.query_params)
        workers = await self._fleet.get(client)
        # In a thread: of ten thousand workers this takes a while, and rounds go on meanwhile.
        page = await asyncio.to_thread(fleet_page, workers, query)
        runs = await client.runs()
        newest = next((run for run in reversed(runs) if run.phase not in ENDED), runs[-1] if runs else None)
        run = await client.of(newest.name).run() if newest is not None else pb.Run()
        name = "fleet_rows.html" if request.query_params.get("part") == "rows" else "fleet.html"
        return await self._page(request, name, visitor, client, {"page": page, "run": run})

    async def worker(self, request: Request) -> Response:
        """Show one device: what it is, how it is, and where the time of its last tasks went."""
        visitor, client = self._visit(request)
        name = request.path_params["worker"]
        known = next((each for each in await self._fleet.get(client) if each.worker == name), None)
        member = next((each for each in await self._members.get(client) if each.name == name), None)
        if known is None and member is None:
            raise NotFound(f"no device is called {name[:80]!r}")
        # Only of the last runs: each takes a look at some hundred rounds.
        runs = [client.of(run.name) for run in (await client.runs())[-_RUNS_SHOWN:]] if known else []
        values = {
            "name": name,
            "worker": known,
            "member": member,
            "histories": [(run.run_name, tasks) for run in runs if (tasks := await past_tasks(run, name))],
            "plans": [(run.run_name, await run.run()) for run in runs],
        }
        return await self._page(request, "worker.html", visitor, client, values)

    async def audit(self, request: Request) -> Response:
        """Show the last lines of the audit log."""
        visitor, client = self._visit(request)
        text = _SEARCH.cleaned(request.query_params.get("text", ""))
        start = _number(request.query_params.get("from", ""))
        words = text.lower().split()
        lines = [line for line in await self._audit.lines(client) if line.has(words)]
        values = {
            **{"text": text, "lines": lines[start : start + _LINES_SHOWN], "start": start, "found": len(lines)},
            **{"step": _LINES_SHOWN, "end": self._audit.end, "damage": self._audit.damage},
        }
        return await self._page(request, "audit.html", visitor, client, values)

    async def sign_in(self, request: Request) -> Response:
        """Show the form that takes the secret of the link; a script of the page fills it in."""
        visitor, client = self._visit(request)
        if not self._visitors.signs_in:
            raise NotFound("there is no such page: visitors are known by their certificates")
        return await self._page(request, "sign_in.html", visitor, client, {})


def queue_of(runs: Sequence[pb.RunSummary]) -> list[pb.RunSummary]:
    """Return the runs that wait for workers, in the order of `fedgrpc.runs.scheduler`."""

    def order(run: pb.RunSummary) -> tuple[float, ...]:
        waited_s = duration_from_proto(run.waiting)
        overdue = waited_s > PATIENCE_S and run.eligible_workers > 0
        return (-waited_s if overdue else 0.0, -run.priority, run.eligible_workers)

    return sorted((run for run in runs if run.wanted_workers), key=order)


def _number(text: str) -> int:
    """Return the number of a parameter; 0 where there is none. Raises `UsageError`."""
    if not text:
        return 0
    if not (text.isascii() and text.isdigit() and len(text) <= 15):
        raise UsageError(f"{text[:20]!r} is no number")
    return int(text)
