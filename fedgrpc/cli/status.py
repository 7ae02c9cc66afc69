"""`fedgrpc status`: the state of an aggregator, once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from fedgrpc.cli import as_json
from fedgrpc.cli.connection import AGGREGATOR_SETTING, client_settings, client_tls
from fedgrpc.cli.options import Declare, SettingsCommand
from fedgrpc.cli.tables import links_table, predictions_table, rounds_table, workers_table
from fedgrpc.cli.view import piped_console, print_table, run_line
from fedgrpc.client import connect
from fedgrpc.errors import UsageError
from fedgrpc.protocol.records import version_to_proto
from fedgrpc.storage.database import DATABASE
from fedgrpc.storage.run_store import RunStore
from fedgrpc.v1.aggregator_pb2 import Run, RunPhase, WorkerRecord
from fedgrpc.v1.round_pb2 import Round

_show = Declare("What to show")
# The last round may be an evaluation round or abandoned, and have no predictions.
_LOOKED_BACK = 20
_MAX_ROUND = (1 << 63) - 1
_MAX_BYTES = 1 << 30

SETTINGS = [
    AGGREGATOR_SETTING,
    Declare("Where")(
        "--data-dir",
        "Read this data folder in place of a running aggregator.",
        type=click.Path(path_type=Path, exists=True, file_okay=False),
    ),
    _show("--json/--table", "JSON, for programs.", name="as_json", default=False),
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
    *client_settings(),
]


@dataclass(frozen=True)
class Status:
    """A run with its latest rounds, oldest first. `healthy` is None for a data folder."""

    run: Run
    workers: Sequence[WorkerRecord]
    latest: Sequence[Round]
    healthy: bool | None


def _run(**values: Any) -> None:
    count, folder = max(values["rounds"], _LOOKED_BACK), values["data_dir"]
    status = asyncio.run(_asked(values, count)) if folder is None else stored(folder, count)
    if values["as_json"]:
        click.echo(as_json.json_text(_plain(status, values["rounds"])))
    else:
        _print(status, values)


async def _asked(values: dict[str, Any], count: int) -> Status:
    async with connect(values["aggregator"], client_tls(values)) as aggregator:
        run, workers, healthy = await aggregator.run(), await aggregator.workers(), await aggregator.healthy()
        return Status(run, workers, await aggregator.latest_rounds(count), healthy)


def stored(folder: Path, count: int) -> Status:
    """Read the status from a data folder. Raises `UsageError` for one without a run, and `StorageError`."""
    if not (folder / DATABASE).exists():
        raise UsageError(f"{folder} is not an aggregator's data folder: it has no {DATABASE}")
    with closing(RunStore(folder / DATABASE, read_only=True)) as store:
        kept, version = store.run(), store.latest_version()
        if kept is None:
            raise UsageError(f"the data folder {folder} holds no run yet")
        run = Run(id=kept.id, name=kept.name, phase=RunPhase.Name(kept.phase), reason=kept.reason)
        if version is not None:
            run.model_version = version.version
            run.last.CopyFrom(version_to_proto(version))
        run.started_at.FromNanoseconds(int(kept.started_at * 1e9))
        rounds, _ = store.rounds(_MAX_ROUND, count, _MAX_BYTES)
        run.current_round = rounds[0].number if rounds else 0
        return Status(run, [], rounds[::-1], None)


def _plain(status: Status, count: int) -> dict[str, Any]:
    run = as_json.plain(status.run)
    return {
        "healthy": status.healthy,
        "run": {**run, "settings": as_json.settings(run["settings"])},
        "rounds": [as_json.plain(record) for record in status.latest[-count:]],
        "workers": [as_json.plain(record) for record in status.workers],
    }


def _print(status: Status, values: dict[str, Any]) -> None:
    run, workers, latest, healthy = status.run, status.workers, status.latest, status.healthy
    rounds = latest[-values["rounds"] :]
    console = piped_console()
    console.print(run_line(run), style="bold", highlight=False, markup=False, soft_wrap=True)
    if healthy is False:
        console.print(
            "NOT_SERVING: the data folder fails, or the aggregator is ending; see its log", highlight=False
        )
    tables = [rounds_table(rounds), workers_table(workers)]
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


COMMAND = SettingsCommand("status", _run, SETTINGS, "Show a running aggregator: run, last rounds, workers.")
