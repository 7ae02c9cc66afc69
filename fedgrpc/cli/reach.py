"""The three ways to an aggregator: its data folder on this host, a context file, or an address with TLS files."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import click
import structlog

from fedgrpc.cli.connection import AGGREGATOR_SETTING, DEFAULT_AGGREGATOR, client_settings, client_tls
from fedgrpc.cli.options import Declare, Setting
from fedgrpc.client import Client, connect
from fedgrpc.errors import CertificateStale, FedgrpcError, LinkError, UsageError
from fedgrpc.identity.context import Context
from fedgrpc.identity.folder import IDENTITY
from fedgrpc.protocol.durations import duration_from_proto
from fedgrpc.rpc.channel import Tls
from fedgrpc.rpc.local_socket import SOCKET, local_address

RENEW_AFTER: Final = 2 / 3
_where = Declare("Where")
DATA_DIR_HELP: Final = "Data folder of an aggregator that runs on this host; its owner needs no certificate."

log = structlog.get_logger()


def reach_settings(data_dir_help: str = DATA_DIR_HELP) -> list[Setting]:
    """Declare how a command of an operator reaches an aggregator."""
    return [
        AGGREGATOR_SETTING,
        _where("--data-dir", data_dir_help, type=click.Path(path_type=Path, exists=True, file_okay=False)),
        _where(
            "--context",
            "Context file of an operator; without any of these: ~/.config/fedgrpc/context, if there is one.",
            type=click.Path(path_type=Path, exists=True, dir_okay=False),
        ),
        *client_settings(),
    ]


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
        async with connect(values.get("aggregator") or DEFAULT_AGGREGATOR, tls) as client:
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
