"""`fedgrpc pause`, `resume`, `rollback` and `stop`: an operator's control of a run. `fedgrpc audit`: its log.

exit code 0     done; one line shows the state of the run. audit: every seal of the log holds
          1     the certificate is not an operator's. audit: a line was changed, removed or inserted
          3     the run has ended
          4     no aggregator answers
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

import click

from fedgrpc.calls import Calls
from fedgrpc.claims import printable
from fedgrpc.cli.connection import FILE
from fedgrpc.cli.options import Declare, Setting, SettingsCommand
from fedgrpc.cli.reach import client_command, reach_settings, reached
from fedgrpc.errors import CorruptError
from fedgrpc.identity.audit import Position, check_line
from fedgrpc.storage.files import storage_errors
from fedgrpc.v1.aggregator_pb2 import Run
from fedgrpc.words import run_line

REASON = Declare("Reason")(
    "--reason", "Reason in one line; the run keeps it.", type=str, default="", metavar="TEXT"
)

_VERSION: Final = click.Argument(["version"], type=click.IntRange(0, (1 << 63) - 1))


def steering(group: str, run: click.Argument) -> dict[str, SettingsCommand]:
    """Return `pause`, `resume`, `stop` and `rollback` of the run that the argument `run` names, by their names.

    `group` is the beginning of their full names, "run " or "".
    """

    def command(
        name: str,
        steer: Callable[[Calls, Mapping[str, Any]], Awaitable[Run]],
        help: str,
        *settings: Setting,
        arguments: Sequence[click.Argument] = (run,),
    ) -> tuple[str, SettingsCommand]:
        async def call(client: Calls, values: dict[str, Any]) -> None:
            click.echo(run_line(await steer(client.of(values["run_name"] or ""), values)))

        return name, client_command(f"{group}{name}", call, help, *settings, arguments=arguments)

    # An argument that may be left out comes last.
    rolled_back = [run, _VERSION] if run.required else [_VERSION, run]
    return dict(
        [
            command(
                "pause",
                lambda client, _: client.pause(),
                "Open no further round of a run; the round in progress continues.",
            ),
            command("resume", lambda client, _: client.resume(), "Open rounds of a run again after a pause."),
            command(
                "stop",
                lambda client, values: client.stop(values["reason"]),
                "End a run for good; its round in progress is abandoned.",
                REASON,
            ),
            command(
                "rollback",
                lambda client, values: client.roll_back(values["version"], values["reason"]),
                "Continue a run from a kept VERSION, such as the best one that `fedgrpc status` shows; "
                "0: from a new initial model.",
                REASON,
                arguments=rolled_back,
            ),
        ]
    )


_STEERING: Final = steering("", click.Argument(["run_name"], metavar="[RUN]", required=False))
PAUSE, RESUME, STOP, ROLLBACK = _STEERING.values()


_show = Declare("What to show")
_AUDIT_SETTINGS = [
    _show("--last", "How many entries; 0 shows all.", type=click.IntRange(min=0), default=20),
    _show(
        "--about", "Only entries with this text in them: a name, a call, an address.", default="", metavar="TEXT"
    ),
    _show("--json/--text", "The lines as they are in the log.", name="as_json", default=False),
    _show(
        "--file",
        "Read this file, DATA/identity/audit.jsonl or a copy of it, and ask no aggregator.",
        type=FILE,
        default=None,
    ),
    *reach_settings(),
]


def _audit(**values: Any) -> int:
    return asyncio.run(_show_log(values))


async def _show_log(values: Mapping[str, Any]) -> int:
    shown: deque[str] = deque(maxlen=values["last"] or None)
    end, broken = Position(), ""
    async for line in _lines(values):
        try:
            record, end = check_line(line, end)
        except CorruptError as error:
            broken = str(error)
            break
        text = printable(line.decode().rstrip("\n")) if values["as_json"] else _text(record)
        if values["about"] in text:
            shown.append(text)
    for text in shown:
        click.echo(text)
    if broken:
        click.echo(f"error: {broken}; the {end.count} lines before it are whole", err=True)
        return 1
    seal = f"; the last is {end.seal.hex()}" if end.count else ""
    click.echo(f"{end.count} entries, and every seal holds{seal}", err=True)
    return 0


async def _lines(values: Mapping[str, Any]) -> AsyncIterator[bytes]:
    if values["file"] is None:
        async with reached(values) as client:
            async for line in client.identities.audit_lines():
                yield line
        return
    with storage_errors(values["file"], "read"), values["file"].open("rb") as file:
        for line in file:
            yield line


def _text(record: Mapping[str, Any]) -> str:
    about = " ".join(f"{name}={json.dumps(value)}" for name, value in record["about"].items())
    words = (record["at"], record["who"], record["from"], record["what"], about, record["result"])
    return "  ".join(printable(str(word)) for word in words if word)


AUDIT = SettingsCommand("audit", _audit, _AUDIT_SETTINGS, "Check the audit log, and show its last entries.")
