"""`fedgrpc pause`, `resume`, `rollback` and `stop`: an operator's control of a run.

exit code 0     done; one line shows the state of the run
          1     the run has ended, the certificate is not an operator's, or no aggregator answers
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import click

from fedgrpc.cli.options import Declare, SettingsCommand
from fedgrpc.cli.reach import reach_settings, reached
from fedgrpc.cli.view import run_line
from fedgrpc.client import Client
from fedgrpc.v1.aggregator_pb2 import Run

Call = Callable[[Client, dict[str, Any]], Awaitable[Run]]


def _command(
    name: str, call: Call, help: str, *settings: Any, arguments: Sequence[click.Argument] = ()
) -> SettingsCommand:
    def run(**values: Any) -> None:
        click.echo(run_line(asyncio.run(_call(call, values))))

    command = SettingsCommand(name, run, [*settings, *reach_settings()], help)
    command.params[:0] = arguments
    return command


async def _call(call: Call, values: dict[str, Any]) -> Run:
    async with reached(values) as aggregator:
        return await call(aggregator, values)


_REASON = Declare("Reason")(
    "--reason", "Reason in one line; the run keeps it.", type=str, default="", metavar="TEXT"
)

PAUSE = _command(
    "pause",
    lambda aggregator, _: aggregator.pause(),
    "Open no further round; the round in progress continues.",
)
RESUME = _command("resume", lambda aggregator, _: aggregator.resume(), "Open rounds again after a pause.")
ROLLBACK = _command(
    "rollback",
    lambda aggregator, values: aggregator.roll_back(values["version"], values["reason"]),
    "Continue from a kept VERSION, such as the best one that `fedgrpc status` shows; 0: from a new initial model.",
    _REASON,
    arguments=[click.Argument(["version"], type=click.IntRange(0, (1 << 63) - 1))],
)
STOP = _command(
    "stop",
    lambda aggregator, values: aggregator.stop(values["reason"]),
    "End a run for good; the round in progress is abandoned.",
    _REASON,
)
