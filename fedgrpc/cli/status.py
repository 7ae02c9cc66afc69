"""`fedgrpc status` and `fedgrpc watch`: the state of a run, once, or live until the run ends.

On a terminal, `watch` keeps a live view; elsewhere it prints one line per change. Its exit code is

          0     the run is finished
          3     an operator has stopped the run
          4     the aggregator could not be reached, at first or for longer than `--patience`
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from rich.live import Live

from fedgrpc.calls import Calls
from fedgrpc.claims import printable
from fedgrpc.cli import as_json
from fedgrpc.cli.options import AS_JSON, Declare, SettingsCommand
from fedgrpc.cli.reach import reach_settings, reached
from fedgrpc.cli.run import print_runs
from fedgrpc.cli.stored_runs import find_run, stored_runs
from fedgrpc.cli.tables import links_table, live_view, predictions_table, rounds_table, workers_table
from fedgrpc.cli.values import DURATION
from fedgrpc.cli.view import piped_console, print_table
from fedgrpc.errors import LinkError, UsageError
from fedgrpc.protocol.records import version_to_proto
from fedgrpc.rpc.retry import Backoff, Retries
from fedgrpc.storage.database import DATABASE
from fedgrpc.storage.run_store import RunStore
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1.aggregator_pb2 import Run, RunPhase, WorkerRecord
from fedgrpc.v1.round_pb2 import Round
from fedgrpc.words import SETTLED, ingest_line, round_line, round_phase, run_line, run_phase, scored_line

_show = Declare("What to show")
_RUN: Final = click.Argument(["run_name"], metavar="[RUN]", required=False, default="")
# The last round may be an evaluation round or abandoned, and have no predictions.
_LOOKED_BACK = 20
_MAX_ROUND = (1 << 63) - 1
_MAX_BYTES = 1 << 30
_AGAIN: Final = Backoff(first_s=0.2, cap_s=5.0)
_RECENT: Final = 5
_STOPPED: Final = 3
_ENDED: Final = (pb.RUN_PHASE_FINISHED, pb.RUN_PHASE_STOPPED)

News = pb.WatchRoundsResponse
# Takes what has changed, and the newest scores as a line.
Show = Callable[[News, str], None]

_STATUS_SETTINGS = [
    AS_JSON,
    _show(
        "--plans/--no-plans",
        "Predicted and measured cost of the last round's tasks.",
        name="plans",
        default=False,
    ),
    _show(
        "--links/--no-links",
        "Speed of each worker's link, and its recipes.",
        name="links",
        default=False,
    ),
    _show("--rounds", "Number of last rounds.", type=click.IntRange(1, 1000), default=5),
    *reach_settings("Data folder of an aggregator on this host; where none runs, the folder itself is read."),
]


@dataclass(frozen=True)
class RunStatus:
    """A run with its latest rounds, oldest first, and names of the others. `healthy`: None for a data folder."""

    run: Run
    workers: Sequence[WorkerRecord]
    latest: Sequence[Round]
    healthy: bool | None
    others: Sequence[str] = ()


def _status(**values: Any) -> None:
    count, folder = max(values["rounds"], _LOOKED_BACK), values["data_dir"]
    try:
        status = asyncio.run(_asked(values, count))
    except LinkError:
        if folder is None:
            raise
        status = stored(folder, count, values["run_name"])
    if status is None:
        return
    if values["as_json"]:
        click.echo(as_json.json_text(_plain(status, values["rounds"])))
    else:
        _print(status, values)


async def _asked(values: dict[str, Any], count: int) -> RunStatus | None:
    """Return the status of a run; None where none is named and the aggregator has several: they are listed."""
    async with reached(values) as client:
        runs = await client.runs()
        aggregator = client.of(values["run_name"])
        try:
            run = await aggregator.run()
        except UsageError:
            if values["run_name"] or values["as_json"]:
                raise
            print_runs(runs)
            click.echo("\n`fedgrpc status RUN` shows one of them")
            return None
        workers, healthy = await aggregator.workers(), await aggregator.healthy()
        others = [each.name for each in runs if each.name != run.name]
        return RunStatus(run, workers, await aggregator.latest_rounds(count), healthy, others)


def stored(folder: Path, count: int, name: str = "") -> RunStatus:
    """Read the status of a run from a data folder. Raises as `find_run`, and `StorageError`."""
    found = find_run(folder, name)
    with closing(RunStore(found / DATABASE, read_only=True)) as store:
        kept, version = store.run(), store.latest_version()
        assert kept is not None
        run = Run(id=kept.id, name=kept.name, phase=RunPhase.Name(kept.phase), reason=kept.reason)
        if version is not None:
            run.model_version = version.version
            run.last.CopyFrom(version_to_proto(version))
        run.started_at.FromNanoseconds(int(kept.started_at * 1e9))
        rounds, _ = store.rounds(_MAX_ROUND, count, _MAX_BYTES)
        run.current_round = rounds[0].number if rounds else 0
        others = [each for each in stored_runs(folder) if each != run.name]
        return RunStatus(run, [], rounds[::-1], None, others)


def _plain(status: RunStatus, count: int) -> dict[str, Any]:
    run = as_json.plain(status.run)
    return {
        "healthy": status.healthy,
        "run": {**run, "settings": as_json.settings(run["settings"])},
        "rounds": [as_json.plain(record) for record in status.latest[-count:]],
        "workers": [as_json.plain(record) for record in status.workers],
    }


def _print(status: RunStatus, values: dict[str, Any]) -> None:
    run, workers, latest, healthy = status.run, status.workers, status.latest, status.healthy
    rounds = latest[-values["rounds"] :]
    console = piped_console()
    console.print(run_line(run), style="bold", highlight=False, markup=False, soft_wrap=True)
    if status.others:
        names = ", ".join(map(printable, status.others))
        console.print(f"other runs: {names}", highlight=False, markup=False, soft_wrap=True)
    if healthy is False:
        console.print(
            "NOT_SERVING: the data folder fails, or the aggregator is ending; see its log", highlight=False
        )
    if run.HasField("ingest"):
        console.print(ingest_line(run.ingest), highlight=False)
    tables = [rounds_table(rounds), workers_table(workers, run.name)]
    predictions = predictions_table(latest)
    if values["plans"]:
        tables.append(predictions)
    if values["links"]:
        tables.append(links_table(workers))
    for table in tables:
        if table.row_count:
            console.print()
            print_table(console, table)
    if values["plans"] and not predictions.row_count:
        console.print(f"\nno task of the last {len(latest)} rounds had its cost predicted", highlight=False)


STATUS = SettingsCommand(
    "status",
    _status,
    _STATUS_SETTINGS,
    "Show a running aggregator: run, last rounds, workers. Without RUN and with several: which there are.",
)
STATUS.params[:0] = [_RUN]


_WATCH_SETTINGS = [
    Declare("Where")(
        "--patience", "How long to retry after the connection is lost.", type=DURATION, default=300.0
    ),
    *reach_settings(),
]


def _watch(**values: Any) -> int:
    return asyncio.run(_watched(values))


async def _watched(values: dict[str, Any]) -> int:
    console = piped_console()
    async with reached(values) as client:
        aggregator = client.of(values["run_name"])
        if not console.is_terminal:
            return await follow(aggregator, _lines(console), _remark(console), values["patience"])
        with Live(console=console, refresh_per_second=8) as live:

            def show(news: News, scored: str) -> None:
                live.update(live_view(news.run, news.round, scored))

            return await follow(aggregator, show, _remark(console), values["patience"])


async def follow(aggregator: Calls, show: Show, remark: Callable[[str], None], patience_s: float) -> int:
    """Show every change until the run ends; return the exit code.

    Raises `LinkError` where no aggregator answers at first, or again within `patience_s`.
    """
    heard, lost_at = False, math.inf
    retries = Retries(_AGAIN)
    seen, scored = None, ""
    while True:
        try:
            phase = None
            async for news in aggregator.watch():
                heard, lost_at = True, math.inf
                retries.reset()
                phase = news.run.phase
                if seen != (seen := (phase, news.round.number, news.round.phase)):
                    # An aggregator whose run has ended may exit before this call.
                    with suppress(LinkError):
                        scored = scored_line(await aggregator.latest_rounds(_RECENT, whole=False))
                show(news, scored)
            if phase in _ENDED:
                return 0 if phase == pb.RUN_PHASE_FINISHED else _STOPPED
            remark("the aggregator is ending before its run; waiting for it to come back")
        except LinkError:
            # Counted from the loss: a run that is paused has no news for hours.
            lost_at = min(lost_at, time.monotonic())
            if not heard or time.monotonic() - lost_at > patience_s:
                raise
            remark("the connection is lost before the run has ended; waiting for the aggregator to come back")
        await asyncio.sleep(retries.next_delay_s())


def _remark(console: Console) -> Callable[[str], None]:
    told = ""

    def remark(text: str) -> None:
        nonlocal told
        if text != told:
            console.print(printable(text), highlight=False, soft_wrap=True, markup=False)
        told = text

    return remark


def _lines(console: Console) -> Show:
    """Print a line when the run or a round changes its phase, when a task ends, and for new scores."""
    shown: object = None
    told = ""

    def show(news: News, scored: str) -> None:
        nonlocal shown, told
        phases = tuple(task.phase for task in news.round.tasks if task.phase in SETTLED)
        state = (run_phase(news.run), news.round.number, round_phase(news.round), phases)
        if scored != told:
            console.print(scored, highlight=False, soft_wrap=True, markup=False)
            told = scored
        if state != shown:
            line = f"{run_line(news.run)} | {round_line(news.round)}"
            console.print(line, highlight=False, soft_wrap=True, markup=False)
            shown = state

    return show


WATCH = SettingsCommand("watch", _watch, _WATCH_SETTINGS, "Follow a run of a running aggregator until it ends.")
WATCH.params[:0] = [_RUN]
