"""Tables fit where they are shown: columns go whole, quantities are never cut, notes have lines of their own."""

from __future__ import annotations

import io

from rich.console import Console

from fedgrpc.calls import natural_order
from fedgrpc.cli.run import row_of
from fedgrpc.cli.tables import Column, Table, predictions_table, rounds_table, task_table, workers_table
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import round_pb2

REASON = "pi-7: slow training: deadline of 20 s passed before the last byte of its update was there, as in round 3"


def _lines(table: Table, width: int | None) -> list[str]:
    return [line.plain for line in table.lines(width)]


def _rounds() -> list[round_pb2.Round]:
    tasks = [
        round_pb2.TaskRecord(worker="pi-1", phase=round_pb2.TASK_PHASE_ACCEPTED, download_bytes=19_600),
        round_pb2.TaskRecord(worker="pi-7", phase=round_pb2.TASK_PHASE_LATE, reason=REASON.removeprefix("pi-7: ")),
    ]
    scores = {"accuracy": 0.8123, "loss": 0.7114}
    return [
        round_pb2.Round(
            number=12, phase=round_pb2.ROUND_PHASE_COMMITTED, tasks=tasks, duration_seconds=2.414, metrics=scores
        )
    ]


def test_on_80_columns_no_quantity_is_cut_and_the_note_is_whole() -> None:
    lines = _lines(rounds_table(_rounds()), 80)
    assert all(len(line) <= 80 for line in lines[:2])
    for text in ("12", "1/2", "2.41 s", "committed", "accuracy 0.8123, loss 0.7114"):
        assert text in lines[1]
    assert lines[2].endswith(REASON)


def test_columns_go_by_rank_and_the_table_says_which() -> None:
    table = Table(Column("name"), Column("bytes", True, 1), Column("cores", True, 2))
    table.add_row("pi", "19.6 kB", "4")
    assert _lines(table, 80) == ["name    bytes  cores", "pi    19.6 kB      4"]
    assert _lines(table, 14) == ["name    bytes", "pi    19.6 kB", "not shown, too narrow: cores"]
    assert _lines(table, 1)[-1] == "not shown, too narrow: bytes, cores"


def test_a_pipe_gets_every_column_however_wide() -> None:
    table = Table(Column("name"), Column("reason", rank=9))
    table.add_row("pi", "x" * 500)
    out = io.StringIO()
    Console(file=out, width=80).print(table, soft_wrap=True)
    assert "x" * 500 in out.getvalue()
    assert _lines(table, None)[1].endswith("x" * 500)


def test_cells_are_shown_as_they_are_and_never_as_markup() -> None:
    table = Table(Column("device"))
    table.add_row("[/x][bold]", note="[/nope]")
    assert _lines(table, 80) == ["device", "[/x][bold]", "  └ [/nope]"]
    task = round_pb2.TaskRecord(worker="pi", device_class="[/x]", phase=round_pb2.TASK_PHASE_FAILED, reason="[/n]")
    assert "[/x]" in _lines(task_table(round_pb2.Round(tasks=[task])), None)[1]


def test_an_abandoned_round_says_why_its_first_task_failed() -> None:
    failed = round_pb2.TaskRecord(
        worker="a", phase=round_pb2.TASK_PHASE_FAILED, reason="ZeroDivisionError (bad.py:17)"
    )
    record = round_pb2.Round(phase=round_pb2.ROUND_PHASE_ABANDONED, reason="0 of 1 updates", tasks=[failed])
    assert "0 of 1 updates; a: ZeroDivisionError (bad.py:17)" in _lines(rounds_table([record]), 80)[2]


def test_workers_come_in_the_order_that_people_count() -> None:
    assert sorted(["pi-10", "pi-2", "a", "pi-1"], key=natural_order) == ["a", "pi-1", "pi-2", "pi-10"]


def test_a_worker_that_neither_polls_nor_trains_is_silent() -> None:
    record = pb.WorkerRecord(worker="pi", state=pb.WORKER_STATE_IDLE)
    assert "idle" in _lines(workers_table([record]), None)[1]
    record.last_seen_ago.FromSeconds(26)
    assert "silent" in _lines(workers_table([record]), None)[1]


def test_a_worker_that_takes_no_tasks_of_the_shown_run_has_the_reason_below_it() -> None:
    record = pb.WorkerRecord(worker="pi", refusals={"digits": "no option 'width'", "other": "too large"})
    assert _lines(workers_table([record], "digits"), 80)[2:] == ["  └ takes no tasks of digits: no option 'width'"]
    assert len(_lines(workers_table([record], "third"), 80)) == 2


def test_the_closing_evaluation_is_no_round_beyond_the_last() -> None:
    assert row_of(pb.RunSummary(name="digits", current_round=21, total_rounds=20))[2] == "20/20"
    assert row_of(pb.RunSummary(name="digits", current_round=4, total_rounds=20))[2] == "4/20"
    assert row_of(pb.RunSummary(name="digits", current_round=4))[2] == "4"


def test_a_plan_is_a_note_below_its_costs() -> None:
    task = round_pb2.TaskRecord(worker="pi", phase=round_pb2.TASK_PHASE_ACCEPTED)
    task.prediction.local_seconds = 1.0
    task.local_model.sub_model = "prefix:0.5"
    lines = _lines(predictions_table([round_pb2.Round(tasks=[task])]), 80)
    assert lines[2] == "  └ width = 0.5"
