"""`fedgrpc audit`: check every seal of the audit log, and show its last entries.

exit code 0     every seal holds
          1     a line was changed, removed or inserted; no aggregator answers, or it refuses
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import click

from fedgrpc.claims import printable
from fedgrpc.cli.options import Declare, SettingsCommand
from fedgrpc.cli.reach import reach_settings, reached
from fedgrpc.errors import CorruptError
from fedgrpc.identity.audit import Position, check_line
from fedgrpc.storage.files import storage_errors

_show = Declare("What to show")
SETTINGS = [
    _show("--last", "How many entries; 0 shows all.", type=click.IntRange(min=0), default=20),
    _show(
        "--about", "Only entries with this text in them: a name, a call, an address.", default="", metavar="TEXT"
    ),
    _show("--json/--text", "The lines as they are in the log.", name="as_json", default=False),
    _show(
        "--file",
        "Read this file, DATA/identity/audit.jsonl or a copy of it, and ask no aggregator.",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        default=None,
    ),
    *reach_settings(),
]


def _run(**values: Any) -> int:
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


COMMAND = SettingsCommand("audit", _run, SETTINGS, "Check the audit log, and show its last entries.")
