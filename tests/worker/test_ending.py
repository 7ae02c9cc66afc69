"""Workers that are told to wait or to end, and processes that are killed."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedgrpc.errors import (
    UsageError,
)
from fedgrpc.worker.process import Worker, run_worker
from fedgrpc.worker.settings import WorkerSettings
from tests.support.fake_aggregator import PATIENCE_S, SOON_S, FakeAggregator, model, serving, train_task
from tests.support.running_worker import AddOneTrainer, run_against, running_worker, spooled, worker_settings


async def test_a_paused_worker_takes_no_task_until_it_is_resumed(tmp_path):
    peer = FakeAggregator({1: model(1)}, ends=False)
    async with serving(peer) as server:
        worker = Worker(worker_settings(server.address, tmp_path), lambda _: AddOneTrainer())
        async with running_worker(worker):
            await peer.until(lambda: "PollTask" in peer.calls)
            worker.pause()
            await asyncio.sleep(0.1)
            await peer.give(train_task())
            await asyncio.sleep(0.3)
            assert peer.pulled == []
            worker.resume()
            await peer.until(lambda: "t1" in peer.uploads and peer.uploads["t1"].complete)


async def test_a_draining_worker_finishes_its_task_and_takes_no_other(tmp_path):
    peer = FakeAggregator({1: model(1)}, ends=False)
    peer.tasks = [train_task("t1"), train_task("t2")]
    trainer = AddOneTrainer(steps=10, gate=threading.Event())
    async with serving(peer) as server:
        worker = Worker(worker_settings(server.address, tmp_path), lambda _: trainer)
        task = asyncio.create_task(worker.run())
        await asyncio.to_thread(trainer.started.wait, PATIENCE_S)
        worker.drain()
        assert await asyncio.wait_for(task, PATIENCE_S) == 0
    assert peer.uploads["t1"].complete
    assert "t2" not in peer.uploads
    assert peer.calls[-1] == "Leave"


async def test_a_drain_that_takes_too_long_gives_the_task_back(tmp_path):
    peer = FakeAggregator({1: model(1)}, ends=False)
    peer.tasks = [train_task("t1")]
    trainer = AddOneTrainer(steps=10_000, gate=threading.Event())
    async with serving(peer) as server:
        worker = Worker(worker_settings(server.address, tmp_path), lambda _: trainer)
        task = asyncio.create_task(worker.run())
        await asyncio.to_thread(trainer.started.wait, PATIENCE_S)
        worker.drain(within_s=0.2, exit_code=143)
        assert await asyncio.wait_for(task, PATIENCE_S) == 143
    assert peer.failures["t1"] == "the worker is shutting down"
    assert peer.calls[-1] == "Leave"


async def test_an_idle_worker_drains_at_once(tmp_path):
    peer = FakeAggregator(ends=False)
    async with serving(peer) as server:
        worker = Worker(worker_settings(server.address, tmp_path), lambda _: AddOneTrainer())
        task = asyncio.create_task(worker.run())
        await peer.until(lambda: "PollTask" in peer.calls)
        worker.drain()
        assert await asyncio.wait_for(task, SOON_S) == 0
    assert peer.calls[-1] == "Leave"


async def test_an_aggregator_that_knows_of_no_leaving_keeps_no_worker_from_it(tmp_path):
    peer = FakeAggregator(ends=False)
    peer.faults.append(("Leave", NotImplementedError("of an earlier version")))
    async with serving(peer) as server:
        worker = Worker(worker_settings(server.address, tmp_path), lambda _: AddOneTrainer())
        task = asyncio.create_task(worker.run())
        await peer.until(lambda: "PollTask" in peer.calls)
        worker.drain()
        assert await asyncio.wait_for(task, PATIENCE_S) == 0


async def test_a_user_task_that_hangs_does_not_keep_the_worker_alive(tmp_path):
    class Hangs(AddOneTrainer):
        def train(self, weights, job):
            self.started.set()
            time.sleep(2 * PATIENCE_S)

    peer = FakeAggregator({1: model(1)}, ends=False)
    peer.tasks = [train_task("t1")]
    trainer = Hangs()
    async with serving(peer) as server:
        worker = Worker(worker_settings(server.address, tmp_path), lambda _: trainer)
        task = asyncio.create_task(worker.run())
        await asyncio.to_thread(trainer.started.wait, PATIENCE_S)
        worker.stop(130)
        assert await asyncio.wait_for(task, SOON_S) == 130


async def test_a_worker_may_stay_when_the_run_has_ended(tmp_path):
    peer = FakeAggregator()
    async with serving(peer) as server:
        worker = Worker(
            worker_settings(server.address, tmp_path, exit_when_run_ends=False, poll_wait_s=0.1),
            lambda _: AddOneTrainer(),
        )
        async with running_worker(worker) as task:
            await peer.until(lambda: peer.calls.count("PollTask") >= 3)
            assert not task.done()


async def test_two_workers_cannot_share_a_folder(tmp_path):
    peer = FakeAggregator(ends=False)
    async with serving(peer) as server:
        worker = Worker(worker_settings(server.address, tmp_path), lambda _: AddOneTrainer())
        async with running_worker(worker):
            await peer.until(lambda: "PollTask" in peer.calls)
            with pytest.raises(UsageError, match="another worker"):
                await run_worker(worker_settings(server.address, tmp_path), AddOneTrainer())


async def test_a_name_the_aggregator_refuses_ends_the_worker_with_its_reason(tmp_path):
    peer = FakeAggregator()
    peer.faults = [("Register", UsageError("the name pi-1 is taken"))]
    with pytest.raises(UsageError, match="pi-1 is taken"):
        await run_against(peer, tmp_path)


async def test_the_trainer_may_be_built_from_what_the_aggregator_tells(tmp_path):
    told = []

    def build(registration):
        told.append(registration)
        return AddOneTrainer()

    peer = FakeAggregator({1: model(1)})
    peer.tasks = [train_task()]
    async with serving(peer) as server:
        await run_worker(worker_settings(server.address, tmp_path), build_trainer=build)
    assert [registration.learning_task for registration in told] == ["tests:Linear"]
    assert peer.uploads["t1"].complete


@pytest.mark.parametrize(
    "bad",
    [
        {"name": "pi 1"},
        {"name": ""},
        {"aggregator": "nowhere"},
        {"serve_address": "here"},
        {"stall_s": 0},
        {"device": {"colour": "red"}},
    ],
)
def test_a_wrong_setting_is_a_usage_error(tmp_path, bad):
    with pytest.raises(UsageError):
        WorkerSettings(**{"name": "pi-1", "aggregator": "localhost:1", "state_dir": tmp_path, **bad})


# Real processes.

SCRIPT = """
import asyncio, sys
from pathlib import Path
from fedgrpc.worker.process import run_worker
from fedgrpc.worker.settings import WorkerSettings
from fedgrpc.worker.throttle import Throttle
from tests.support.running_worker import AddOneTrainer

settings = WorkerSettings("pi-1", sys.argv[1], Path(sys.argv[2]) / "state", drain_s=float(sys.argv[3]),
                          serve_address=None, throttle=Throttle(link_bits_per_second=float(sys.argv[4])))
sys.exit(asyncio.run(run_worker(settings, AddOneTrainer())))
"""
ROOT = Path(__file__).parents[2]


@contextmanager
def worker_process(address, tmp_path, drain_s=PATIENCE_S, rate=1e9):
    arguments = [sys.executable, "-c", SCRIPT, address, str(tmp_path), str(drain_s), str(rate)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(arguments, cwd=ROOT, stdout=log, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def exit_code(process):
    return await asyncio.to_thread(process.wait, PATIENCE_S)


async def test_a_worker_killed_while_it_uploads_resumes_after_its_restart_and_does_not_train_again(tmp_path):
    peer = FakeAggregator({1: model(1, size=30_000)})
    peer.tasks = [train_task()]
    async with serving(peer) as server:
        with worker_process(server.address, tmp_path, rate=400_000) as first:
            await peer.until(lambda: peer.calls.count("PushUpdate.chunk") >= 20)
            first.kill()
            await exit_code(first)
        held = len(peer.uploads["t1"].data)
        assert len(spooled(tmp_path)) == 1
        pulled = len(peer.pulled)
        with worker_process(server.address, tmp_path) as second:
            assert await exit_code(second) == 0
    assert held >= 19_000
    assert peer.uploads["t1"].acknowledged_times == 1
    assert len(peer.pulled) == pulled
    total_chunks = -(-len(peer.uploads["t1"].data) // 1000)
    assert peer.calls.count("PushUpdate.chunk") <= total_chunks + 3


async def test_sigterm_lets_an_upload_finish(tmp_path):
    peer = FakeAggregator({1: model(1, size=30_000)})
    peer.tasks = [train_task()]
    async with serving(peer) as server:
        with worker_process(server.address, tmp_path, rate=1_000_000) as process:
            await peer.until(lambda: peer.calls.count("PushUpdate.chunk") >= 5)
            process.send_signal(signal.SIGTERM)
            assert await exit_code(process) == 0
    assert peer.uploads["t1"].complete


async def test_a_second_sigterm_ends_the_process_at_once_and_keeps_the_update(tmp_path):
    peer = FakeAggregator({1: model(1, size=30_000)})
    peer.tasks = [train_task()]
    async with serving(peer) as server:
        with worker_process(server.address, tmp_path, drain_s=2 * PATIENCE_S, rate=200_000) as process:
            await peer.until(lambda: peer.calls.count("PushUpdate.chunk") >= 1)
            process.send_signal(signal.SIGTERM)
            # To a process that stands still two are one.
            async with asyncio.timeout(PATIENCE_S):
                while "draining" not in (tmp_path / "log").read_text():  # noqa: ASYNC110 - a file wakes nobody
                    await asyncio.sleep(0.05)
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            assert await exit_code(process) == 143
    assert not peer.uploads["t1"].complete
    assert len(spooled(tmp_path)) == 1
