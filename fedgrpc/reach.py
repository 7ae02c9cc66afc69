"""Ways to an aggregator: a data folder on this host, a context file, or an address with TLS files."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from fedgrpc.calls import Calls, connect
from fedgrpc.errors import CertificateStale, FedgrpcError, LinkError
from fedgrpc.identity.context import Context
from fedgrpc.identity.folder import IDENTITY
from fedgrpc.protocol.durations import duration_from_proto
from fedgrpc.rpc.address import SOCKET, local_address
from fedgrpc.rpc.channel import Tls

DEFAULT_AGGREGATOR: Final = "127.0.0.1:50051"
RENEW_AFTER: Final = 2 / 3


@asynccontextmanager
async def on_this_host(data_dir: Path) -> AsyncIterator[Calls]:
    """Dial the aggregator of a data folder, whose owner needs no certificate. Raises `LinkError`."""
    if not (data_dir / IDENTITY / SOCKET).exists():
        raise LinkError(
            f"no aggregator runs here with the data folder {data_dir}: start it, or use --context for another one"
        )
    with local_address(data_dir / IDENTITY) as address:
        async with connect(address) as calls:
            yield calls


@asynccontextmanager
async def by_context(path: Path) -> AsyncIterator[Calls]:
    """Dial the aggregator of an operator's context file, whose certificate is renewed when that is due."""
    context = Context.read(path)
    await _keep_fresh(context)
    async with connect(context.aggregator, _tls(context)) as calls:
        yield calls


@asynccontextmanager
async def by_default(address: str | None, tls: Tls | None, context: Path | None) -> AsyncIterator[Calls]:
    """Dial by a context file if there is one, else an address, else the usual one."""
    if context is None:
        async with connect(address or DEFAULT_AGGREGATOR, tls) as calls:
            yield calls
        return
    async with by_context(context) as calls:
        yield calls


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
        async with connect(context.aggregator, _tls(context)) as calls:
            found = await calls.identities.renew()
    except FedgrpcError as error:
        if not error.retryable or isinstance(error, CertificateStale):
            raise
        # Without the aggregator the caller's own call will say so.
        return
    renew_after = time.time() + RENEW_AFTER * duration_from_proto(found.valid_for)
    context.renewed(found.certificate, found.ca, renew_after)
