"""A run from the command line: an aggregator and its workers as processes, looked at while they work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support.command_line import (
    NUMPY_TASK,
    aggregator_command,
    environment,
    fedgrpc,
    running_command,
    until_line,
    worker_arguments,
)
from tests.support.processes import free_address

_AGGREGATOR = ("--task", NUMPY_TASK, "--min-workers", "2", "--rounds", "3", "--epochs", "1", "--seed", "1")


@contextmanager
def _workers(folder: Path, address: str, count: int = 2, *more: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                running_command(*worker_arguments(folder, address, name, *more), log=folder / f"{name}.log")
            )
            for name in (f"pi-{number}" for number in range(1, count + 1))
        ]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A run of three rounds that has ended; its aggregator still answers."""
    folder = tmp_path_factory.mktemp("run")
    with aggregator_command(folder, *_AGGREGATOR, "--stay", "--metrics-address", "127.0.0.1:0") as (_, address):
        with _workers(folder, address) as workers:
            assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
        yield address, folder


def test_status_shows_the_run_its_rounds_and_its_workers(finished_run: tuple[str, Path]) -> None:
    ended = fedgrpc("status", "--aggregator", finished_run[0])
    assert ended.code == 0, ended.error
    assert "run default · finished · 3 of 3 rounds committed · model version 4" in ended.out
    assert ended.out.count("committed") >= 4
    for text in ("pi-1", "pi-2", "trainer", "accuracy 0."):
        assert text in ended.out
    assert not [line for line in ended.out.splitlines() if line != line.rstrip()]


def test_status_as_json_is_for_programs(finished_run: tuple[str, Path]) -> None:
    ended = fedgrpc("status", "--aggregator", finished_run[0], "--json", "--rounds", "2")
    answer = json.loads(ended.out)
    assert answer["run"]["phase"] == "finished"
    assert [worker["worker"] for worker in answer["workers"]] == ["pi-1", "pi-2"]
    assert len(answer["rounds"]) == 2


def test_status_into_a_closed_pipe_is_quiet(finished_run: tuple[str, Path]) -> None:
    readable, writable = os.pipe()
    os.close(readable)
    arguments = [sys.executable, "-m", "fedgrpc", "status", "--aggregator", finished_run[0], "--json"]
    done = subprocess.run(arguments, stdout=writable, stderr=subprocess.PIPE, env=environment(), timeout=300)
    os.close(writable)
    assert done.stderr == b""
    assert done.returncode == 1


def test_logs_without_a_terminal_are_json_lines_that_carry_run_round_and_worker(
    finished_run: tuple[str, Path],
) -> None:
    for name in ("aggregator", "pi-1"):
        lines = [json.loads(line) for line in (finished_run[1] / f"{name}.log").read_text().splitlines()]
        assert all({"timestamp", "level", "event"} <= line.keys() for line in lines)
        about_a_round = [line for line in lines if "round" in line]
        assert about_a_round
        assert all("run" in line for line in about_a_round)
        assert name == "aggregator" or all(line["worker"] == name for line in about_a_round)


def test_logs_hold_no_token(finished_run: tuple[str, Path]) -> None:
    for log in finished_run[1].glob("*.log"):
        assert '"token"' not in log.read_text().replace('"token": "***"', "")


def test_watch_follows_a_run_to_its_end(tmp_path: Path) -> None:
    with aggregator_command(tmp_path, *_AGGREGATOR) as (aggregator, address):
        with running_command("watch", "--aggregator", address, log=tmp_path / "watch.log") as watch:
            until_line(tmp_path / "watch.log", "run default", watch)
            with _workers(tmp_path, address) as workers:
                assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
            assert watch.wait(timeout=300) == 0
        assert aggregator.wait(timeout=300) == 0
    lines = (tmp_path / "watch.log").read_text().splitlines()
    assert "running" in lines[0]
    assert "run default · finished · 3 of 3 rounds committed" in lines[-1]


def test_an_operator_pauses_resumes_and_stops_a_run(tmp_path: Path) -> None:
    with aggregator_command(tmp_path, *_AGGREGATOR, "--stay") as (_, address):
        told = [fedgrpc(order, "--aggregator", address) for order in ("pause", "resume")]
        told.append(fedgrpc("stop", "--aggregator", address, "--reason", "enough is\nenough"))
        assert [(ended.code, ended.error) for ended in told] == [(0, "")] * 3
        assert [ended.out for ended in told] == [
            "run default · paused · 0 of 3 rounds committed · no model yet\n",
            "run default · running · 0 of 3 rounds committed · no model yet\n",
            "run default · stopped · 0 of 3 rounds committed · no model yet (enough is enough)\n",
        ]
        too_late = fedgrpc("resume", "--aggregator", address)
        assert (too_late.code, too_late.error) == (3, "error: the run has ended: enough is enough\n")


def test_metrics_are_served_while_the_run_goes_on(tmp_path: Path) -> None:
    metrics = free_address()
    settings = [*_AGGREGATOR, "--stay", "--metrics-address", metrics]
    with aggregator_command(tmp_path, *settings) as (_, address), _workers(tmp_path, address) as workers:
        assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
        text = urllib.request.urlopen(f"http://{metrics}/metrics", timeout=300).read().decode()
    assert 'fedgrpc_tasks_total{outcome="accepted",run="default"}' in text
    assert 'fedgrpc_model_version{run="default"} 4.0' in text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_aggregator_and_worker_cleanly(number: signal.Signals, tmp_path: Path) -> None:
    with (
        aggregator_command(tmp_path, *_AGGREGATOR) as (aggregator, address),
        _workers(tmp_path, address, 1) as (worker,),
        running_command("watch", "--aggregator", address, log=tmp_path / "watch.log") as watch,
    ):
        until_line(tmp_path / "pi-1.log", "connected", worker)
        until_line(tmp_path / "watch.log", "run default", watch)
        for process in (watch, worker, aggregator):
            process.send_signal(number)
            # A worker that had nothing in hand has drained, which is a success.
            assert process.wait(timeout=300) in ({0} if process is worker else {128 + number, -number})
    for log in tmp_path.glob("*.log"):
        assert "Traceback" not in log.read_text()


def test_an_aggregator_whose_log_nobody_reads_any_more_still_ends_when_told_to(tmp_path: Path) -> None:
    readable, writable = os.pipe()
    settings = ["--address", "127.0.0.1:0", "--data-dir", str(tmp_path / "data")]
    arguments = [sys.executable, "-m", "fedgrpc", "aggregator", *settings]
    with subprocess.Popen(arguments, stdout=writable, stderr=writable, env=environment()) as aggregator:
        try:
            os.close(writable)
            with os.fdopen(readable) as log:
                assert "serving" in log.readline()
            aggregator.send_signal(signal.SIGTERM)
            assert aggregator.wait(timeout=300) == 128 + signal.SIGTERM
        finally:
            aggregator.kill()
