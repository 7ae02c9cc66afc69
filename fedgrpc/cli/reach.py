"""Settings by which a command of an operator reaches an aggregator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from fedgrpc.calls import Calls
from fedgrpc.cli.connection import FILE, client_settings, client_tls
from fedgrpc.cli.options import Declare, Setting, SettingsCommand
from fedgrpc.errors import UsageError
from fedgrpc.reach import DEFAULT_AGGREGATOR, by_default, default_context, on_this_host

T = TypeVar("T")
Call = Callable[[Calls, dict[str, Any]], Awaitable[None]]

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
            show_default=DEFAULT_AGGREGATOR,
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
    return calling_command(name, reached, call, help, *settings, *reach_settings(), arguments=arguments)


def calling_command(
    name: str,
    reach: Callable[[Mapping[str, Any]], AbstractAsyncContextManager[T]],
    call: Callable[[T, dict[str, Any]], Awaitable[None]],
    help: str,
    *settings: Setting,
    arguments: Sequence[click.Argument] = (),
) -> SettingsCommand:
    """Return a command that opens what `reach` finds by its settings, and makes `call` with it."""

    async def made(values: dict[str, Any]) -> None:
        async with reach(values) as found:
            await call(found, values)

    def run(**values: Any) -> None:
        asyncio.run(made(values))

    command = SettingsCommand(name, run, list(settings), help)
    command.params[:0] = arguments
    return command


@asynccontextmanager
async def reached(values: Mapping[str, Any]) -> AsyncIterator[Calls]:
    """Dial the aggregator that the settings name for as long as the block lasts.

    Raises `UsageError` for settings that cannot be used together or at all.
    """
    ways = ("aggregator", "data_dir", "context")
    given = [way for way in ways if values.get(way) is not None]
    if len(given) > 1:
        raise UsageError(f"give one of {' and '.join('--' + way.replace('_', '-') for way in given)}")
    if values.get("data_dir") is not None:
        async with on_this_host(values["data_dir"]) as client:
            yield client
        return
    tls = client_tls(values)
    context = values.get("context") or (default_context() if not given and tls is None else None)
    if context is not None and tls is not None:
        raise UsageError("--context brings its own certificates; leave out --tls and --tls-...")
    async with by_default(values.get("aggregator"), tls, context) as client:
        yield client
