"""What peers say is shown as text: nothing of it is markup, and a terminal obeys none of it."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fedgrpc.cli.tables import live_view, rounds_table, task_table, workers_table
from fedgrpc.v1.aggregator_pb2 import Run, WorkerRecord
from fedgrpc.v1.device_pb2 import DeviceProfile
from fedgrpc.v1.round_pb2 import Round, RoundPhase, TaskPhase, TaskRecord
from fedgrpc.words import round_line, run_line

HOSTILE = "[/x] [bold red]red[/] \x1b]0;PWNED\x07\x1b[2J \u202eevil"


def _shown() -> list[object]:
    task = TaskRecord(worker="evil", phase=TaskPhase.TASK_PHASE_FAILED, reason=HOSTILE, device_class=HOSTILE)
    record = Round(number=1, phase=RoundPhase.ROUND_PHASE_ABANDONED, reason=HOSTILE, tasks=[task])
    record.metrics[HOSTILE] = 0.5
    worker = WorkerRecord(worker="evil", device=DeviceProfile(device_class=HOSTILE))
    run = Run(name="default", reason=HOSTILE)
    lines = [run_line(run), round_line(record)]
    return [*lines, task_table(record), rounds_table([record]), workers_table([worker]), live_view(run, record)]


@pytest.mark.parametrize("number", range(6))
def test_what_peers_say_is_shown_as_it_is_and_commands_no_terminal(number: int) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=400, color_system=None)
    console.print(_shown()[number], markup=False, highlight=False, soft_wrap=True)
    assert "[/x] [bold red]red[/]" in out.getvalue()
    assert "\x1b]" not in out.getvalue()
    assert "\x1b[2J" not in out.getvalue()
    assert "\u202e" not in out.getvalue()
