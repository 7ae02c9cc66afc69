"""`fedgrpc watch`: a running aggregator, live on a terminal, and one line per change elsewhere.

exit code 0     the run is finished
          1     the aggregator could not be reached, at first or for longer than `--patience`
          3     an operator has stopped the run
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from rich.console import Console
from rich.live import Live

from fedgrpc.claims import printable
from fedgrpc.cli.connection import AGGREGATOR_SETTING, client_settings, client_tls
from fedgrpc.cli.options import Declare, SettingsCommand
from fedgrpc.cli.tables import live_view
from fedgrpc.cli.value_types import DURATION
from fedgrpc.cli.view import SETTLED, piped_console, round_line, round_phase, run_line, run_phase, scored_line
from fedgrpc.client import Client, connect
from fedgrpc.errors import LinkError
from fedgrpc.rpc.retry import Backoff, Retries
from fedgrpc.v1 import aggregator_pb2 as pb

_AGAIN: Final = Backoff(first_s=0.2, cap_s=5.0)
_RECENT: Final = 5
_STOPPED: Final = 3
_ENDED: Final = (pb.RUN_PHASE_FINISHED, pb.RUN_PHASE_STOPPED)

News = pb.WatchRoundsResponse
# Takes what has changed, and the newest scores as a line.
Show = Callable[[News, str], None]

SETTINGS = [
    AGGREGATOR_SETTING,
    Declare("Where")(
        "--patience", "How long to retry after the connection is lost.", type=DURATION, default=300.0
    ),
    *client_settings(),
]


def _run(**values: Any) -> int:
    return asyncio.run(_watch(values))


async def _watch(values: dict[str, Any]) -> int:
    console = piped_console()
    async with connect(values["aggregator"], client_tls(values)) as aggregator:
        if not console.is_terminal:
            return await follow(aggregator, _lines(console), _remark(console), values["patience"])
        with Live(console=console, refresh_per_second=8) as live:

            def show(news: News, scored: str) -> None:
                live.update(live_view(news.run, news.round, scored))

            return await follow(aggregator, show, _remark(console), values["patience"])


async def follow(aggregator: Client, show: Show, remark: Callable[[str], None], patience_s: float) -> int:
    """Show every change until the run ends; return the exit code.

    Raises `LinkError` where no aggregator answers at first, or again within `patience_s`.
    """
    heard, lost_at = False, math.inf
    retries = Retries(_AGAIN)
    seen, scored = None, ""
    while True:
        try:
            phase = None
            async for news in aggregator.watch():
                heard, lost_at = True, math.inf
                retries.reset()
                phase = news.run.phase
                if seen != (seen := (phase, news.round.number, news.round.phase)):
                    # An aggregator whose run has ended may exit before this call.
                    with suppress(LinkError):
                        scored = scored_line(await aggregator.latest_rounds(_RECENT, whole=False))
                show(news, scored)
            if phase in _ENDED:
                return 0 if phase == pb.RUN_PHASE_FINISHED else _STOPPED
            remark("the aggregator is ending before its run; waiting for it to come back")
        except LinkError:
            # Counted from the loss: a run that is paused has no news for hours.
            lost_at = min(lost_at, time.monotonic())
            if not heard or time.monotonic() - lost_at > patience_s:
                raise
            remark("the connection is lost before the run has ended; waiting for the aggregator to come back")
        await asyncio.sleep(retries.next_delay_s())


def _remark(console: Console) -> Callable[[str], None]:
    told = ""

    def remark(text: str) -> None:
        nonlocal told
        if text != told:
            console.print(printable(text), highlight=False, soft_wrap=True, markup=False)
        told = text

    return remark


def _lines(console: Console) -> Show:
    """Print a line when the run or a round changes its phase, when a task ends, and for new scores."""
    shown: object = None
    told = ""

    def show(news: News, scored: str) -> None:
        nonlocal shown, told
        phases = tuple(task.phase for task in news.round.tasks if task.phase in SETTLED)
        state = (run_phase(news.run), news.round.number, round_phase(news.round), phases)
        if scored != told:
            console.print(scored, highlight=False, soft_wrap=True, markup=False)
            told = scored
        if state != shown:
            line = f"{run_line(news.run)} | {round_line(news.round)}"
            console.print(line, highlight=False, soft_wrap=True, markup=False)
            shown = state

    return show


COMMAND = SettingsCommand("watch", _run, SETTINGS, "Follow a running aggregator until its run ends.")
