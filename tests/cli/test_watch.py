"""`fedgrpc watch` tells a run that has ended from an aggregator that is gone; `status` reads a folder, too."""

from __future__ import annotations

import json
import signal
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from fedgrpc.calls import Calls
from fedgrpc.cli.status import follow
from fedgrpc.errors import LinkError
from fedgrpc.v1 import aggregator_pb2 as pb
from tests.support.command_line import (
    NUMPY_TASK,
    aggregator_command,
    fedgrpc,
    fedgrpc_here,
    running_command,
    until_line,
    worker_arguments,
)
from tests.support.processes import free_address

_RUN = ("--task", NUMPY_TASK, "--min-workers", "1", "--rounds", "2", "--epochs", "1")


def test_watch_outlives_a_restart_of_the_aggregator_and_ends_with_the_run(tmp_path: Path) -> None:
    address, log, watched = free_address(), tmp_path / "aggregator.log", tmp_path / "watch.log"
    serve = ("aggregator", "--address", address, "--data-dir", str(tmp_path / "data"), *_RUN)
    with running_command(*serve, log=log) as first:
        until_line(log, "serving", first)
        with running_command("watch", "--aggregator", address, log=watched) as watch:
            until_line(watched, "run default", watch)
            first.send_signal(signal.SIGTERM)
            assert first.wait(timeout=300) == 143
            until_line(watched, "waiting for it to come back", watch)
            with (
                running_command(*serve, "--stay", log=tmp_path / "again.log"),
                running_command(*worker_arguments(tmp_path, address, "pi"), log=tmp_path / "pi.log"),
            ):
                assert watch.wait(timeout=120) == 0
    assert "finished" in watched.read_text().splitlines()[-1]


def test_watch_of_an_aggregator_that_does_not_come_back_fails(tmp_path: Path) -> None:
    address, log, watched = free_address(), tmp_path / "aggregator.log", tmp_path / "watch.log"
    with running_command(
        "aggregator", "--address", address, "--data-dir", str(tmp_path / "data"), *_RUN, log=log
    ) as it:
        until_line(log, "serving", it)
        with running_command("watch", "--aggregator", address, "--patience", "100ms", log=watched) as watch:
            until_line(watched, "run default", watch)
            it.kill()
            assert watch.wait(timeout=300) == 4
    assert "cannot reach" in watched.read_text().splitlines()[-1]


def test_watch_says_by_its_exit_code_that_an_operator_has_stopped_the_run(tmp_path: Path) -> None:
    address, log, watched = free_address(), tmp_path / "aggregator.log", tmp_path / "watch.log"
    with running_command(
        "aggregator", "--address", address, "--data-dir", str(tmp_path / "data"), *_RUN, log=log
    ) as it:
        until_line(log, "serving", it)
        with running_command("watch", "--aggregator", address, log=watched) as watch:
            until_line(watched, "run default", watch)
            assert fedgrpc("stop", "--aggregator", address).code == 0
            assert watch.wait(timeout=300) == 3


def test_status_reads_the_folder_of_a_run_whose_aggregator_has_left(tmp_path: Path) -> None:
    address, data = free_address(), tmp_path / "data"
    serve = ("aggregator", "--address", address, "--data-dir", str(data), *_RUN)
    with (
        running_command(*serve, log=tmp_path / "aggregator.log") as aggregator,
        running_command(*worker_arguments(tmp_path, address, "pi"), log=tmp_path / "pi.log"),
    ):
        assert aggregator.wait(timeout=300) == 0
    before = sorted((path.name, path.stat().st_mtime_ns) for path in data.rglob("*.safetensors"))
    shown = fedgrpc_here("status", "--data-dir", str(data))
    assert shown.code == 0, shown.error
    assert "run default · finished · 2 rounds committed · model version 3" in shown.out
    answer = json.loads(fedgrpc("status", "--data-dir", str(data), "--json").out)
    assert (answer["healthy"], answer["run"]["model_version"], answer["rounds"][0]["number"]) == (None, 3, 0)
    assert before == sorted((path.name, path.stat().st_mtime_ns) for path in data.rglob("*.safetensors"))


def test_status_of_a_folder_without_a_run_is_one_clear_line(tmp_path: Path) -> None:
    ended = fedgrpc_here("status", "--data-dir", str(tmp_path))
    assert (ended.code, "data folder" in ended.error) == (2, True)
    (tmp_path / "run.sqlite").write_bytes(b"not a database" * 100)
    ended = fedgrpc_here("status", "--data-dir", str(tmp_path))
    assert (ended.code, len(ended.error.splitlines())) == (1, 1)
    (tmp_path / "run.sqlite").unlink()
    sqlite3.connect(tmp_path / "run.sqlite").close()
    assert fedgrpc_here("status", "--data-dir", str(tmp_path)).code in (1, 2)


class _Quiet:
    """An aggregator without news for 1,000 s, which then goes away, comes back, and ends its run."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._visits = 0

    def monotonic(self) -> float:
        return self.now_s

    async def watch(self) -> AsyncIterator[pb.WatchRoundsResponse]:
        self._visits += 1
        if self._visits == 1:
            yield pb.WatchRoundsResponse(run=pb.Run(phase=pb.RUN_PHASE_PAUSED))
            self.now_s += 1000
        if self._visits < 3:
            raise LinkError("gone")
        yield pb.WatchRoundsResponse(run=pb.Run(phase=pb.RUN_PHASE_FINISHED))

    async def latest_rounds(self, count: int, whole: bool = True) -> list[Any]:
        return []


async def test_patience_counts_from_the_loss_and_not_from_the_last_news(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = _Quiet()
    monkeypatch.setattr("fedgrpc.cli.status.time", quiet)
    assert await follow(cast(Calls, quiet), lambda news, scored: None, lambda text: None, patience_s=300) == 0


def test_status_and_watch_are_of_the_run_that_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text(f'[run]\ntask = "{NUMPY_TASK}"\nmin-workers = 1\nrounds = 1\nepochs = 1\n')
    data = str(tmp_path / "data")
    with aggregator_command(tmp_path) as (_, address):
        for name in ("a", "b"):
            assert fedgrpc_here("run", "submit", str(file), "--name", name, "--data-dir", data).code == 0
        listed = fedgrpc_here("status", "--data-dir", data)
        assert (listed.code, [line.split()[0] for line in listed.out.splitlines()[:3]]) == (0, ["RUN", "a", "b"])
        for call in (("status", "--json"), ("watch",)):
            ended = fedgrpc_here(*call, "--data-dir", data)
            assert (ended.code, "a, b" in ended.error) == (2, True)
        assert fedgrpc_here("status", "c", "--data-dir", data).code == 1
        assert "run a · paused" in fedgrpc_here("pause", "a", "--data-dir", data).out
        assert "a, b" in fedgrpc_here("pause", "--data-dir", data).error
        assert fedgrpc_here("rollback", "7", "c", "--data-dir", data).code == 1
        with running_command(*worker_arguments(tmp_path, address, "pi"), log=tmp_path / "pi.log"):
            assert fedgrpc_here("watch", "b", "--data-dir", data).code == 0
        shown = fedgrpc_here("status", "b", "--data-dir", data).out
        assert "run b · finished" in shown
        assert "other runs: a" in shown
    assert "run b · finished" in fedgrpc_here("status", "b", "--data-dir", data).out
    assert fedgrpc_here("privacy", "b", "--data-dir", data).error == (
        "error: this run releases its versions without noise\n"
    )
    assert "has no run 'c'" in fedgrpc_here("privacy", "c", "--data-dir", data).error
    several = fedgrpc_here("status", "--data-dir", data)
    assert (several.code, "a, b" in several.error) == (2, True)
