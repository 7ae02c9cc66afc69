"""`fedgrpc pause`, `resume`, `rollback` and `stop`: what an operator tells a running aggregator.

exit code 0     done; one line says where the run stands
          1     the run has ended, this certificate is no operator's, or nobody answers
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import click

from fedgrpc.cli.connection import AGGREGATOR_SETTING, client_settings, client_tls
from fedgrpc.cli.options import Declare, SettingsCommand
from fedgrpc.cli.view import run_line
from fedgrpc.client import Client, connect
from fedgrpc.v1.aggregator_pb2 import Run

Order = Callable[[Client, dict[str, Any]], Awaitable[Run]]


def _command(
    name: str, order: Order, help: str, *settings: Any, arguments: Sequence[click.Argument] = ()
) -> SettingsCommand:
    def run(**values: Any) -> None:
        click.echo(run_line(asyncio.run(_tell(order, values))))

    command = SettingsCommand(name, run, [AGGREGATOR_SETTING, *settings, *client_settings()], help)
    command.params[:0] = arguments
    return command


async def _tell(order: Order, values: dict[str, Any]) -> Run:
    async with connect(values["aggregator"], client_tls(values)) as aggregator:
        return await order(aggregator, values)


_REASON = Declare("What to say")(
    "--reason", "Why, in one line; it is kept with the run.", type=str, default="", metavar="TEXT"
)

PAUSE = _command(
    "pause",
    lambda aggregator, _: aggregator.pause(),
    "Open no further round of a run; the one in progress goes on.",
)
RESUME = _command("resume", lambda aggregator, _: aggregator.resume(), "Open rounds again after a pause.")
ROLLBACK = _command(
    "rollback",
    lambda aggregator, values: aggregator.roll_back(values["version"], values["reason"]),
    "Go on from a VERSION that is kept, such as the best that `fedgrpc status` shows; 0: from a new first model.",
    _REASON,
    arguments=[click.Argument(["version"], type=click.IntRange(0, (1 << 63) - 1))],
)
STOP = _command(
    "stop",
    lambda aggregator, values: aggregator.stop(values["reason"]),
    "End a run for good; the round in progress is abandoned.",
    _REASON,
)
