from __future__ import annotations

import urllib.request

import pytest
from prometheus_client import generate_latest

from fedgrpc.errors import UsageError
from fedgrpc.metrics import Metrics, ProcessMetrics, serve_metrics
from fedgrpc.v1.device_pb2 import Timings
from fedgrpc.v1.round_pb2 import Prediction, Round, TaskRecord


def _round() -> Round:
    accepted = TaskRecord(
        worker="pi-1",
        phase="TASK_PHASE_ACCEPTED",
        download_bytes=100,
        upload_bytes=20,
        timings=Timings(download_seconds=0.5, local_seconds=4, upload_seconds=1, global_seconds=0.02),
        peak_memory_bytes=300 << 20,
        tensor_bytes=5 << 20,
        prediction=Prediction(local_seconds=6, peak_memory_bytes=150 << 20),
    )
    late = TaskRecord(worker="pi-2", phase="TASK_PHASE_LATE", download_bytes=100)
    scores = {"loss": 2.0, "local_accuracy": 0.75}
    ended = {"phase": "ROUND_PHASE_COMMITTED", "duration_seconds": 6, "training_metrics": scores}
    return Round(number=7, tasks=[accepted, late], **ended)


def _scrape(metrics: Metrics | ProcessMetrics) -> str:
    with serve_metrics(metrics, "127.0.0.1:0") as port:
        answer = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=300)
        return str(answer.read().decode())


def test_an_ended_round_is_counted_with_its_tasks_bytes_and_times() -> None:
    metrics = Metrics()
    metrics.observe_round(_round())
    metrics.model_version.set(8)
    metrics.observe_scores({"accuracy": 0.5}, "global")
    lines = _scrape(metrics).splitlines()
    for line in (
        'fedgrpc_rounds_total{outcome="committed"} 1.0',
        'fedgrpc_rounds_total{outcome="abandoned"} 0.0',
        'fedgrpc_tasks_total{outcome="accepted"} 1.0',
        'fedgrpc_tasks_total{outcome="late"} 1.0',
        'fedgrpc_payload_bytes_total{direction="download"} 200.0',
        'fedgrpc_payload_bytes_total{direction="upload"} 20.0',
        'fedgrpc_phase_seconds_sum{phase="local"} 4.0',
        'fedgrpc_phase_seconds_count{phase="global"} 1.0',
        'fedgrpc_task_memory_bytes_sum{kind="resident"} 3.145728e+08',
        'fedgrpc_task_memory_bytes_sum{kind="tensors"} 5.24288e+06',
        'fedgrpc_prediction_error_ratio_sum{part="local"} 0.5',
        'fedgrpc_prediction_error_ratio_sum{part="memory"} 0.5',
        'fedgrpc_score{metric="accuracy",of="local"} 0.75',
        'fedgrpc_score{metric="accuracy",of="global"} 0.5',
        "fedgrpc_round_seconds_sum 6.0",
        "fedgrpc_current_round 7.0",
        "fedgrpc_model_version 8.0",
    ):
        assert line in lines


def test_names_of_scores_are_bounded_and_make_room_for_those_that_are_reported_now() -> None:
    metrics = Metrics()
    metrics.observe_scores({f"score-{number:03}": 0.0 for number in range(100)}, "global")
    metrics.observe_scores({"accuracy": 0.5}, "local")
    assert len(_scores(metrics)) == 65
    metrics.observe_scores({"score-001": 3.0, "zzz": 4.0}, "global")
    assert sorted(_scores(metrics)) == [
        'fedgrpc_score{metric="accuracy",of="local"} 0.5',
        'fedgrpc_score{metric="score-001",of="global"} 3.0',
        'fedgrpc_score{metric="zzz",of="global"} 4.0',
    ]


def _scores(metrics: Metrics) -> list[str]:
    return [line for line in _scrape(metrics).splitlines() if line.startswith("fedgrpc_score{")]


def test_two_aggregators_in_one_process_do_not_add_up() -> None:
    first, second = Metrics(), Metrics()
    first.observe_round(_round())
    assert 'fedgrpc_rounds_total{outcome="committed"} 0.0' in _scrape(second)


def test_each_run_of_a_process_has_its_own_samples_until_it_is_removed() -> None:
    metrics = ProcessMetrics()
    metrics.of("a").observe_round(_round())
    metrics.of("b").model_version.set(3)
    metrics.of("b").live_workers.set(7)
    metrics.of("a").observe_round(_round())
    lines = _scrape(metrics).splitlines()
    for line in (
        'fedgrpc_rounds_total{outcome="committed",run="a"} 2.0',
        'fedgrpc_rounds_total{outcome="committed",run="b"} 0.0',
        'fedgrpc_round_seconds_count{run="a"} 2.0',
        'fedgrpc_model_version{run="b"} 3.0',
        "fedgrpc_live_workers 7.0",
    ):
        assert line in lines
    assert [line for line in lines if line.startswith("# TYPE fedgrpc_rounds_total")] == [
        "# TYPE fedgrpc_rounds_total counter"
    ]
    metrics.drop("a")
    assert 'run="a"' not in _scrape(metrics)


def test_a_metrics_port_in_use_is_one_clear_line() -> None:
    with serve_metrics(Metrics(), "127.0.0.1:0") as port:
        taken = f"127.0.0.1:{port}"
        with (
            pytest.raises(UsageError, match=f"cannot serve metrics on {taken}: Address already in use"),
            serve_metrics(Metrics(), taken),
        ):
            pass


def test_a_malformed_metrics_address_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="HOST:PORT"), serve_metrics(Metrics(), "9090"):
        pass


def test_after_a_restart_the_page_shows_what_is_in_the_data_folder() -> None:
    metrics = Metrics()
    older = Round(number=3, metrics={"accuracy": 0.5})
    metrics.restore(5, [Round(number=4), older, Round(number=2, metrics={"accuracy": 0.1})])
    text = generate_latest(metrics.registry).decode()
    for line in ("fedgrpc_model_version 5.0", "fedgrpc_current_round 4.0"):
        assert line in text
    assert 'fedgrpc_score{metric="accuracy",of="global"} 0.5' in text


def test_the_page_names_the_program_and_has_no_times_of_creation() -> None:
    metrics = ProcessMetrics()
    metrics.of("a")
    text = generate_latest(metrics.registry).decode()
    assert "fedgrpc_build_info{version=" in text
    assert "_created" not in text
