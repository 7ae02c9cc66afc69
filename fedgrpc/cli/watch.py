"""`fedgrpc watch`: a running aggregator, live; one line per change where there is no terminal."""

from __future__ import annotations

import asyncio
from typing import Any

from rich.console import Console
from rich.live import Live

from fedgrpc.cli.operator import AGGREGATOR_SETTING, Operator, operator
from fedgrpc.cli.options import SettingsCommand
from fedgrpc.cli.tls import client_settings, client_tls
from fedgrpc.cli.view import SETTLED, live_view, piped_console, round_line, round_phase, run_line, run_phase

SETTINGS = [AGGREGATOR_SETTING, *client_settings()]


def _run(**values: Any) -> None:
    asyncio.run(_watch(values))


async def _watch(values: dict[str, Any]) -> None:
    console = piped_console()
    async with operator(values["aggregator"], client_tls(values)) as aggregator:
        await (_live(aggregator, console) if console.is_terminal else _lines(aggregator, console))


async def _live(aggregator: Operator, console: Console) -> None:
    with Live(console=console, refresh_per_second=8) as live:
        async for news in aggregator.watch():
            live.update(live_view(news.run, news.round))


async def _lines(aggregator: Operator, console: Console) -> None:
    """A line when the run changes its phase, when a round does, and when an update comes in."""
    shown: object = None
    async for news in aggregator.watch():
        phases = tuple(task.phase for task in news.round.tasks if task.phase in SETTLED)
        state = (run_phase(news.run), news.round.number, round_phase(news.round), phases)
        if state != shown:
            console.print(f"{run_line(news.run)} | {round_line(news.round)}", highlight=False, soft_wrap=True)
            shown = state


COMMAND = SettingsCommand("watch", _run, SETTINGS, "Follow a running aggregator until its run ends.")
