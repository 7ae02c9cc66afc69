"""`fedgrpc status`: a running aggregator, once."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import click
from google.protobuf.json_format import MessageToDict

from fedgrpc.cli.operator import AGGREGATOR_SETTING, operator
from fedgrpc.cli.options import Declare, SettingsCommand
from fedgrpc.cli.tls import client_settings, client_tls
from fedgrpc.cli.view import (
    links_table,
    piped_console,
    predictions_table,
    print_table,
    rounds_table,
    run_line,
    workers_table,
)

_show = Declare("What to show")
# The last round may be one that only scores, or was abandoned.
_LOOKED_BACK = 20

SETTINGS = [
    AGGREGATOR_SETTING,
    _show("--json/--table", "JSON, for programs.", name="as_json", default=False),
    _show(
        "--plans/--no-plans",
        "What the last round's tasks were expected to cost, and did cost.",
        name="plans",
        default=False,
    ),
    _show(
        "--links/--no-links",
        "How fast each worker's link is, and the recipes that it is told for it.",
        name="links",
        default=False,
    ),
    _show("--rounds", "How many of the last rounds.", type=click.IntRange(1, 1000), default=5),
    *client_settings(),
]


def _run(**values: Any) -> None:
    asyncio.run(_status(values))


async def _status(values: dict[str, Any]) -> None:
    async with operator(values["aggregator"], client_tls(values)) as aggregator:
        run, workers, healthy = await aggregator.run(), await aggregator.workers(), await aggregator.healthy()
        latest = await aggregator.latest_rounds(max(values["rounds"], _LOOKED_BACK))
    rounds = latest[-values["rounds"] :]
    if values["as_json"]:
        messages = {"run": run, "rounds": rounds, "workers": workers}
        answer = {name: _plain(item) for name, item in messages.items()}
        click.echo(json.dumps({"healthy": healthy, **answer}, indent=2))
        return
    console = piped_console()
    console.print(run_line(run), style="bold", highlight=False)
    if not healthy:
        console.print("NOT_SERVING: its data folder fails, or it is ending; its log says more", highlight=False)
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


def _plain(message: Any) -> Any:
    if isinstance(message, list):
        return [_plain(item) for item in message]
    return MessageToDict(message, preserving_proto_field_name=True)


COMMAND = SettingsCommand("status", _run, SETTINGS, "Show a running aggregator: run, last rounds, workers.")
