"""Ways to an aggregator: a data folder on this host, a context file, or an address with TLS files."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import click

from fedgrpc.cli.connection import FILE, client_settings, client_tls
from fedgrpc.cli.options import Declare, Setting, SettingsCommand
from fedgrpc.client import Client, connect
from fedgrpc.errors import CertificateStale, FedgrpcError, LinkError, UsageError
from fedgrpc.identity.context import Context
from fedgrpc.identity.folder import IDENTITY
from fedgrpc.protocol.durations import duration_from_proto
from fedgrpc.rpc.address import SOCKET, local_address
from fedgrpc.rpc.channel import Tls

Call = Callable[[Client, dict[str, Any]], Awaitable[None]]

RENEW_AFTER: Final = 2 / 3
_DEFAULT_AGGREGATOR: Final = "127.0.0.1:50051"
_DATA_DIR_HELP: Final = "Data folder of an aggregator that runs on this host; its owner needs no certificate."
_where = Declare("Where")


def reach_settings(data_dir_help: str = _DATA_DIR_HELP) -> list[Setting]:
    """Declare how a command of an operator reaches an aggregator."""
    return [
        _where(
            "--aggregator",
            "Address of the aggregator.",
            type=str,
            default=None,
            show_default=_DEFAULT_AGGREGATOR,
            metavar="HOST:PORT",
        ),
        _where("--data-dir", data_dir_help, type=click.Path(path_type=Path, exists=True, file_okay=False)),
        _where(
            "--context",
            "Context file of an operator; without any of these: ~/.config/fedgrpc/context, if there is one.",
            type=FILE,
        ),
        *client_settings(),
    ]


def client_command(
    name: str, call: Call, help: str, *settings: Setting, arguments: Sequence[click.Argument] = ()
) -> SettingsCommand:
    """Return a command that reaches an aggregator and makes `call` there."""

    async def reach(values: dict[str, Any]) -> None:
        async with reached(values) as client:
            await call(client, values)

    def run(**values: Any) -> None:
        asyncio.run(reach(values))

    command = SettingsCommand(name, run, [*settings, *reach_settings()], help)
    command.params[:0] = arguments
    return command


@asynccontextmanager
async def reached(values: Mapping[str, Any]) -> AsyncIterator[Client]:
    """Dial the aggregator that the settings name for as long as the block lasts.

    Raises `UsageError` for settings that cannot be used together or at all.
    """
    ways = ("aggregator", "data_dir", "context")
    given = [way for way in ways if values.get(way) is not None]
    if len(given) > 1:
        raise UsageError(f"give one of {' and '.join('--' + way.replace('_', '-') for way in given)}")
    if values.get("data_dir") is not None:
        async with _local(values["data_dir"]) as client:
            yield client
        return
    tls = client_tls(values)
    path = values.get("context") or (default_context() if not given and tls is None else None)
    if path is None:
        async with connect(values.get("aggregator") or _DEFAULT_AGGREGATOR, tls) as client:
            yield client
        return
    if tls is not None:
        raise UsageError("--context brings its own certificates; leave out --tls and --tls-...")
    context = Context.read(path)
    await _keep_fresh(context)
    async with connect(context.aggregator, _tls(context)) as client:
        yield client


@asynccontextmanager
async def _local(folder: Path) -> AsyncIterator[Client]:
    if not (folder / IDENTITY / SOCKET).exists():
        raise LinkError(f"no aggregator runs here with the data folder {folder}")
    with local_address(folder / IDENTITY) as address:
        async with connect(address) as client:
            yield client


def default_context() -> Path | None:
    """Return this user's context file, if there is one."""
    root = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    path = Path(root) / "fedgrpc" / "context"
    return path if path.exists() else None


def _tls(context: Context) -> Tls:
    return Tls(context.path, context.path, context.path, context.server_name)


async def _keep_fresh(context: Context) -> None:
    """Renew an operator's certificate when that is due. Raises what makes it useless for good."""
    if time.time() < context.renew_after:
        return
    try:
        async with connect(context.aggregator, _tls(context)) as client:
            found = await client.identities.renew()
    except FedgrpcError as error:
        if not error.retryable or isinstance(error, CertificateStale):
            raise
        # Without the aggregator the command itself will say so.
        return
    renew_after = time.time() + RENEW_AFTER * duration_from_proto(found.valid_for)
    context.renewed(found.certificate, found.ca, renew_after)
