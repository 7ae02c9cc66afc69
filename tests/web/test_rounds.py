"""What is kept of rounds, and who holds up the present one."""

import json

import pytest

from fedgrpc.v1.round_pb2 import Round, TaskRecord
from fedgrpc.web.rounds import (
    bar_of,
    lost,
    outlook,
    past_task,
    segments,
    series_of,
    summary_of,
    time_bar,
    times_text,
    waited_for,
)


def task(worker, phase, progress=0.0, **more):
    return TaskRecord(worker=worker, phase=f"TASK_PHASE_{phase}", progress=progress, **more)


def round_of(*tasks, number=1, phase="REPORTING", **more):
    return Round(number=number, phase=f"ROUND_PHASE_{phase}", tasks=tasks, **more)


def test_a_bar_is_full_and_its_parts_are_as_wide_as_their_counts():
    record = round_of(task("a", "ACCEPTED"), task("b", "TRAINING"), task("c", "LATE"), task("d", "EXPIRED"))
    parts = {part.kind: part for part in bar_of(record)}
    assert {kind: part.count for kind, part in parts.items()} == {"accepted": 1, "training": 1, "lost": 2}
    assert sum(part.width for part in parts.values()) == pytest.approx(100)
    assert parts["lost"].start == pytest.approx(50)


def test_tasks_that_a_record_leaves_out_are_in_the_bar():
    record = round_of(task("a", "ACCEPTED"), tasks_left_out=9, accepted_left_out=4)
    assert {part.kind: part.count for part in bar_of(record)} == {"accepted": 5, "offered": 5}


def test_nothing_has_no_parts():
    assert segments([]) == []
    assert bar_of(round_of()) == []


def test_those_who_are_least_far_are_waited_for_first():
    record = round_of(
        task("a", "UPLOADING", 0.1), task("b", "TRAINING", 0.9), task("c", "TRAINING", 0.2), task("d", "ACCEPTED")
    )
    assert [each.worker for each in waited_for(record, 2)] == ["c", "b"]
    assert lost(record, 5) == []


def test_a_task_is_late_where_its_prediction_goes_beyond_the_deadline():
    slow = task("a", "TRAINING", prediction={"local_seconds": 50, "upload_seconds": 20})
    record = round_of(slow)
    assert outlook(record, slow, 0.0) == ""
    record.time_left.seconds = 30
    record.started_at.seconds = 1000
    assert "local" in outlook(record, slow, 1010.0)
    assert outlook(record, slow, 1045.0) == ""
    assert outlook(record, task("b", "TRAINING"), 1010.0) == ""
    assert "not come" in outlook(record, task("c", "OFFERED"), 1010.0)


def test_series_have_one_value_a_round_and_are_json():
    first = summary_of(
        round_of(task("a", "ACCEPTED", download_bytes=5, upload_bytes=3), metrics={"accuracy": 0.5})
    )
    second = summary_of(round_of(number=2, phase="ABANDONED", reason="too few"))
    series = series_of([first, second])
    assert series["rounds"] == [1, 2]
    assert series["scores"] == {"accuracy": {"devices": [0.5, None]}}
    assert series["download_bytes"] == [5, 0]
    assert series["abandoned"] == [2]
    json.dumps(series, allow_nan=False)


def test_without_accuracy_and_loss_two_other_scores_are_drawn():
    metrics = {"mean": 1.0, "error": 2.0, "zeta": 3.0}
    assert list(series_of([summary_of(round_of(metrics=metrics))])["scores"]) == ["error", "mean"]


def test_the_time_of_a_task_is_the_sum_of_its_four_parts():
    timings = {"download_seconds": 1, "local_seconds": 2, "upload_seconds": 3, "global_seconds": 4}
    past = past_task(round_of(), task("a", "ACCEPTED", timings=timings))
    assert past.whole_s == 10
    assert not past.is_lost
    assert [part.width for part in time_bar(past, 20.0)] == pytest.approx([5, 10, 15, 20])
    assert times_text(past) == "T_download 1.00 s, T_local 2.00 s, T_upload 3.00 s, T_global 4.00 s"
