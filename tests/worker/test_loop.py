import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import structlog

from fedgrpc.errors import (
    CorruptError,
    Exhausted,
    LayoutError,
    LinkError,
    RoundClosed,
    StorageError,
    TaskError,
    TooLargeError,
    UnknownTask,
    UnknownWorker,
    UpdateRefused,
    UsageError,
    WrongIdentity,
)
from fedgrpc.rpc.retry import Backoff
from fedgrpc.v1 import round_pb2
from fedgrpc.worker.run import Worker, run_worker
from fedgrpc.worker.settings import WorkerSettings
from fedgrpc.worker.throttle import Throttle
from fedgrpc.worker.trainer import Cancelled, EvalResult, TrainResult
from tests.federation.process import free_address
from tests.worker.peer import PATIENCE_S, SOON_S, Peer, model, serving, train_task


class Adds:
    """Trains by adding one to every float and counting a step; scores are the mean weight."""

    def __init__(self, steps=1, gate=None):
        self.steps = steps
        self.gate = gate
        self.trained = 0
        self.started = threading.Event()

    def initial_weights(self):
        return model(42)

    def train(self, weights, job):
        self.started.set()
        done = 0
        for _ in range(self.steps):
            if job.stop():
                raise Cancelled
            if self.gate is not None:
                self.gate.wait(0.02)
            done += 1
            job.report(done, self.steps)
        self.trained += 1
        trained = {name: array + np.array(1, array.dtype) for name, array in weights.items()}
        return TrainResult(trained, example_count=64, steps=done, metrics={"train_loss": 0.5})

    def evaluate(self, weights):
        return EvalResult(16, {"mean": float(weights["weight"].mean())})


def settings(address, tmp_path, **changes):
    values = {"serve_address": None, "backoff": Backoff(0.02, 0.1), **changes}
    return WorkerSettings(name="pi-1", aggregator=address, state_dir=tmp_path / "state", **values)


async def run(peer, tmp_path, trainer=None, timeout_s=PATIENCE_S, **changes):
    """A worker's whole life with a peer that serves for as long."""
    async with serving(peer) as server:
        task = run_worker(settings(server.address, tmp_path, **changes), trainer or Adds())
        return await asyncio.wait_for(task, timeout_s)


@asynccontextmanager
async def running(worker):
    task = asyncio.create_task(worker.run())
    try:
        yield task
    finally:
        worker.stop()
        await asyncio.wait_for(task, PATIENCE_S)


def spooled(tmp_path):
    return sorted(path.name for path in (tmp_path / "state" / "spool").iterdir() if path.name.isdigit())


async def test_a_task_is_pulled_trained_and_pushed_as_a_difference(tmp_path):
    peer = Peer({1: model(1)})
    peer.tasks = [train_task()]
    assert await run(peer, tmp_path) == 0
    upload = peer.uploads["t1"]
    tensors = upload.tensors()
    assert np.allclose(tensors["weight"], 1, atol=1e-6)
    assert tensors["steps"] == model(1)["steps"] + 1
    assert (upload.header.example_count, upload.header.steps) == (64, 1)
    assert upload.header.metrics == {"train_loss": 0.5}
    assert upload.header.timings.download_seconds > 0
    assert upload.header.timings.local_seconds > 0
    assert upload.header.peak_memory_bytes > 1 << 20
    assert spooled(tmp_path) == []


async def test_the_worker_introduces_its_device_and_what_it_reads(tmp_path):
    peer = Peer()
    await run(
        peer, tmp_path, device={"device_class": "raspberry-pi-4"}, throttle=Throttle(link_bits_per_second=1e6)
    )
    request = peer.registered["pi-1"]
    assert request.device.device_class == "raspberry-pi-4"
    assert request.device.uplink_bits_per_second == 1_000_000
    assert request.device.cpu_cores >= 1
    assert "int8" in request.encodings


async def test_the_pulled_model_is_scored_before_training_when_the_plan_says_so(tmp_path):
    peer = Peer({1: model(1)})
    peer.tasks = [train_task(evaluate=True)]
    await run(peer, tmp_path)
    header = peer.uploads["t1"].header
    assert header.evaluation_metrics["mean"] == pytest.approx(float(model(1)["weight"].mean()))
    assert header.evaluation_example_count == 16


async def test_the_trained_model_is_scored_after_training_where_the_pulled_one_was(tmp_path):
    peer = Peer({1: model(1), 2: model(2)})
    peer.tasks = [train_task("t1", evaluate=True), train_task("t2", 2)]
    await run(peer, tmp_path)
    metrics = peer.uploads["t1"].header.metrics
    assert metrics["local_mean"] == pytest.approx(float(model(1)["weight"].mean()) + 1)
    assert metrics["train_loss"] == 0.5
    assert peer.uploads["t2"].header.metrics == {"train_loss": 0.5}


async def test_an_evaluation_carries_scores_and_no_tensors(tmp_path):
    peer = Peer({1: model(1)})
    peer.tasks = [train_task(kind=round_pb2.TASK_KIND_EVALUATE)]
    trainer = Adds()
    await run(peer, tmp_path, trainer)
    header = peer.uploads["t1"].header
    assert len(header.manifest.entries) == 0
    assert header.evaluation_metrics.keys() == {"mean"}
    assert (header.example_count, header.evaluation_example_count, trainer.trained) == (16, 16, 0)


async def test_initial_weights_are_sent_themselves(tmp_path):
    peer = Peer()
    peer.tasks = [train_task(kind=round_pb2.TASK_KIND_INITIALIZE, round=0)]
    await run(peer, tmp_path)
    tensors = peer.uploads["t1"].tensors()
    assert all(np.array_equal(tensors[name], array) for name, array in model(42).items())
    assert peer.pulled == []


async def test_what_a_lossy_encoding_lost_is_in_the_next_update(tmp_path):
    """arXiv 1901.09847: with error feedback the sum of what was sent follows the sum of the deltas."""

    class Drifts(Adds):
        def train(self, weights, job):
            rng = np.random.default_rng(7)
            trained = {
                name: array + rng.normal(size=array.shape).astype(array.dtype) for name, array in weights.items()
            }
            return TrainResult(trained, 1, 1)

    peer = Peer({1: model(1)})
    rounds = 12
    peer.tasks = [train_task(f"t{n}", upload_recipe="int2", round=n) for n in range(rounds)]
    await run(peer, tmp_path, Drifts())
    rng = np.random.default_rng(7)
    delta = rng.normal(size=(300, 10)).astype(np.float32)
    sent = sum(peer.uploads[f"t{n}"].tensors()["weight"].astype(np.float64) for n in range(rounds))
    alone = peer.uploads["t0"].tensors()["weight"] - delta
    together = sent / rounds - delta
    assert np.abs(together).mean() < 0.35 * np.abs(alone).mean()


async def test_heartbeats_carry_the_phase_and_the_progress(tmp_path):
    peer = Peer({1: model(1)})
    peer.tasks = [train_task()]
    # Slow enough that every phase lasts: one that is over at once is not reported.
    throttle = Throttle(link_bits_per_second=160_000)
    await run(peer, tmp_path, Adds(steps=60, gate=threading.Event()), throttle=throttle)
    phases = [phase for _, phase, _ in peer.beats]
    assert round_pb2.TASK_PHASE_TRAINING in phases
    assert phases[-1] == round_pb2.TASK_PHASE_UPLOADING
    training = [progress for _, phase, progress in peer.beats if phase == round_pb2.TASK_PHASE_TRAINING]
    assert training == sorted(training)
    assert 0.3 < training[-1] <= 1


async def test_a_cancelled_task_stops_between_batches_and_the_worker_takes_the_next(tmp_path):
    peer = Peer({1: model(1)}, ends=False)
    peer.tasks = [train_task("t1")]
    trainer = Adds(steps=10_000, gate=threading.Event())
    async with serving(peer) as server, running(Worker(settings(server.address, tmp_path), lambda _: trainer)):
        await asyncio.to_thread(trainer.started.wait, PATIENCE_S)
        trainer.steps = 1
        peer.cancelled["t1"] = "the round is closed"
        peer.tasks = [train_task("t2")]
        await peer.until(lambda: "t2" in peer.uploads)
        assert "t1" not in peer.uploads
        assert "t1" not in peer.failures


async def test_training_stops_when_the_lease_is_gone(tmp_path):
    peer = Peer({1: model(1)})
    peer.tasks = [train_task("t1")]
    trainer = Adds(steps=10_000, gate=threading.Event())
    async with serving(peer) as server:
        task = asyncio.create_task(run_worker(settings(server.address, tmp_path), trainer))
        await asyncio.to_thread(trainer.started.wait, PATIENCE_S)
        peer.tasks = []
        assert await asyncio.wait_for(task, PATIENCE_S) == 0
    assert trainer.trained == 0


class Raises(Adds):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def train(self, weights, job):
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return super().train(weights, job)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ZeroDivisionError("float\ndivision"), "ZeroDivisionError: float division"),
        (StopIteration(), "StopIteration"),
        (MemoryError(), "MemoryError"),
        (TaskError("task mine raised KeyError: 'x'"), "task mine raised KeyError"),
    ],
)
async def test_a_task_that_raises_is_given_back_with_one_line_and_the_worker_goes_on(tmp_path, error, reason):
    peer = Peer({1: model(1)})
    peer.tasks = [train_task("t1"), train_task("t2")]
    assert await run(peer, tmp_path, Raises(error)) == 0
    assert reason in peer.failures["t1"]
    assert "\n" not in peer.failures["t1"]
    assert peer.uploads["t2"].complete


class Returns(Adds):
    def __init__(self, change, **counts):
        super().__init__()
        self.change, self.counts = change, counts

    def train(self, weights, job):
        result = super().train(weights, job)
        values = {"example_count": 64, "steps": 1, **self.counts}
        return TrainResult(self.change(dict(result.weights)), **values)


def _nan(weights):
    weights["weight"][3, 3] = np.nan
    return weights


@pytest.mark.parametrize(
    ("trainer", "reason"),
    [
        (Returns(_nan), "weight: .*NaN"),
        (Returns(lambda weights: {"weight": weights["weight"]}), "no tensor"),
        (Returns(lambda weights: {**weights, "bias": np.zeros(3, np.float32)}), "bias.*shape"),
        (Returns(lambda weights: weights, example_count=-5), "-5 as example_count"),
    ],
)
async def test_a_training_result_that_cannot_be_sent_is_reported_and_not_sent(tmp_path, trainer, reason):
    peer = Peer({1: model(1)})
    peer.tasks = [train_task()]
    assert await run(peer, tmp_path, trainer) == 0
    assert re.search(reason, peer.failures["t1"])
    assert peer.uploads == {}
    assert spooled(tmp_path) == []


class Gives(Adds):
    """Returns anything at all from one of its methods."""

    def __init__(self, **given):
        super().__init__()
        self.given = given

    def initial_weights(self):
        return self.given.get("initial", model(42))

    def train(self, weights, job):
        return self.given["train"] if "train" in self.given else super().train(weights, job)

    def evaluate(self, weights):
        return self.given.get("scores")


@pytest.mark.parametrize(
    ("given", "kind", "reason"),
    [
        ({"train": None}, "TRAIN", "train() of the learning task returned nothing, not a TrainResult"),
        ({"train": (model(1), 3, 1)}, "TRAIN", "returned a tuple, not a TrainResult"),
        ({"train": TrainResult({"weight": [[1.0]]}, 3, 1)}, "TRAIN", "gave a list as weight 'weight'"),
        ({"train": TrainResult(model(1), None, 1)}, "TRAIN", "reports None as example_count"),
        ({"train": TrainResult(model(1), float("nan"), 1)}, "TRAIN", "reports nan as example_count"),
        ({"train": TrainResult(model(1), 10**30, 1)}, "TRAIN", "as example_count; it must be a whole number"),
        ({"train": TrainResult(model(1), 3, 1, {"loss": "low"})}, "TRAIN", "must be numbers by name"),
        ({"train": TrainResult(model(1), 3, 1, None)}, "TRAIN", "must be numbers by name"),
        ({"scores": 0.5}, "EVALUATE", "evaluate() of the learning task returned a float, not an EvalResult"),
        ({"initial": {"w": [1.0]}}, "INITIALIZE", "gave a list as weight 'w'; weights are NumPy arrays by name"),
        ({"initial": {3: np.zeros(2)}}, "INITIALIZE", "weights are NumPy arrays by name"),
        ({"initial": None}, "INITIALIZE", "gave nothing as weights"),
    ],
    ids=str,
)
async def test_a_learning_task_that_returns_the_wrong_thing_is_given_back_and_the_worker_goes_on(
    tmp_path, given, kind, reason
):
    peer = Peer({1: model(1)})
    peer.tasks = [train_task(kind=getattr(round_pb2, f"TASK_KIND_{kind}"))]
    assert await run(peer, tmp_path, Gives(**given)) == 0
    assert reason in peer.failures["t1"]
    assert peer.uploads == {}


async def test_scores_that_are_not_numbers_do_not_cost_the_update(tmp_path):
    class Diverged(Adds):
        def evaluate(self, weights):
            return EvalResult(4, {"loss": float("nan"), "accuracy": 0.5})

    peer = Peer({1: model(1)})
    peer.tasks = [train_task(evaluate=True)]
    await run(peer, tmp_path, Diverged())
    assert peer.uploads["t1"].header.evaluation_metrics == {"accuracy": 0.5}


async def test_an_evaluator_without_data_says_so(tmp_path):
    class Blind(Adds):
        def evaluate(self, weights):
            return None

    peer = Peer({1: model(1)})
    peer.tasks = [train_task(kind=round_pb2.TASK_KIND_EVALUATE)]
    await run(peer, tmp_path, Blind())
    assert "held-out" in peer.failures["t1"]


async def test_a_kind_of_task_from_the_future_is_given_back(tmp_path):
    peer = Peer({1: model(1)})
    peer.tasks = [train_task(kind=99)]
    assert await run(peer, tmp_path) == 0
    assert "update fedgrpc" in peer.failures["t1"]


# Links, restarts and bounds.


@pytest.mark.parametrize("chunk", [1, 5, 12])
async def test_a_broken_download_goes_on_at_the_byte_where_it_stopped(tmp_path, chunk):
    peer = Peer({1: model(1)})
    peer.tasks = [train_task()]

    async def note(call, note=peer.note):
        await note(call)
        if call == "PullModel.chunk" and peer.calls.count("PullModel.chunk") == chunk + 1:
            raise LinkError("cut")

    peer.note = note
    assert await run(peer, tmp_path) == 0
    assert [offset for _, offset, _ in peer.pulled] == [0, chunk * 1000]
    assert np.allclose(peer.uploads["t1"].tensors()["weight"], 1, atol=1e-6)


async def test_a_corrupt_chunk_is_asked_for_again_and_nothing_before_it(tmp_path):
    peer = Peer({1: model(1)})
    peer.tasks = [train_task()]
    peer.faults = ["corrupt"]
    assert await run(peer, tmp_path) == 0
    assert peer.uploads["t1"].complete
    assert len(peer.pulled) == 2


async def test_a_model_that_changed_under_a_partial_download_starts_over(tmp_path):
    peer = Peer({1: model(1)})
    peer.tasks = [train_task()]

    async def note(call, note=peer.note):
        await note(call)
        if call == "PullModel.chunk" and peer.calls.count(call) == 4:
            peer.models[1] = model(99)
            raise LinkError("restarted with another model")

    peer.note = note
    assert await run(peer, tmp_path) == 0
    assert [offset for _, offset, _ in peer.pulled] == [0, 3000, 0]


@pytest.mark.parametrize("moment", ["PushUpdate", "PushUpdate.chunk", "PushUpdate.acknowledge", "QueryPush"])
@pytest.mark.parametrize(
    "error",
    [LinkError("cut"), Exhausted("no upload slot is free"), StorageError("disk full"), RuntimeError("bug")],
)
async def test_an_upload_that_failed_for_now_is_resumed_until_it_is_acknowledged(tmp_path, moment, error):
    peer = Peer({1: model(1)})
    peer.tasks = [train_task()]
    peer.faults = [(moment, error)]
    trainer = Adds()
    assert await run(peer, tmp_path, trainer) == 0
    assert peer.uploads["t1"].complete
    assert trainer.trained == 1
    assert spooled(tmp_path) == []


async def test_a_refused_upload_comes_back_when_it_is_told_and_keeps_its_session(tmp_path):
    peer = Peer({1: model(1)})
    peer.tasks = [train_task()]
    peer.faults = [("PushUpdate", Exhausted("no upload slot is free", retry_after_s=0.05)) for _ in range(5)]
    assert await run(peer, tmp_path, backoff=Backoff(PATIENCE_S, PATIENCE_S), timeout_s=SOON_S) == 0
    _, *after = peer.calls[peer.calls.index("PushUpdate") :]
    assert after.count("PushUpdate") == 5
    assert "Register" not in after
    assert "QueryPush" not in after


async def test_a_worker_that_has_something_to_send_asks_first_and_comes_when_it_is_told(tmp_path):
    peer = Peer({1: model(1)})
    peer.tasks = [train_task()]
    peer.faults = [("PushUpdate.chunk", LinkError("cut"))]
    peer.retry_after_s = 0.2
    assert await run(peer, tmp_path) == 0
    assert peer.uploads["t1"].complete
    assert peer.pushed_at[1] - peer.told_at >= 0.2


async def test_one_who_waits_for_its_turn_hears_that_the_round_is_over(tmp_path):
    peer = Peer({1: model(1)}, ends=False)
    peer.tasks = [train_task()]
    peer.faults = [("PushUpdate", Exhausted("no upload slot is free", retry_after_s=3000.0))]
    async with serving(peer) as server:
        worker = Worker(settings(server.address, tmp_path), lambda _: Adds())
        async with running(worker):
            await peer.until(lambda: "PushUpdate" in peer.calls)
            peer.cancelled["t1"] = "the round is closed"
            peer.closed["t1"] = "the round is closed"
            await peer.until(lambda: not spooled(tmp_path))


async def test_an_upload_resumes_at_the_byte_the_aggregator_holds(tmp_path):
    peer = Peer({1: model(1)})
    peer.tasks = [train_task()]

    async def note(call, note=peer.note):
        await note(call)
        if call == "PushUpdate.chunk" and peer.calls.count(call) == 7:
            raise LinkError("cut")

    peer.note = note
    assert await run(peer, tmp_path) == 0
    total_chunks = -(-len(peer.uploads["t1"].data) // 1000)
    assert peer.calls.count("PushUpdate.chunk") == total_chunks + 1


async def test_an_answer_that_is_no_acknowledgement_does_not_end_the_upload(tmp_path):
    peer = Peer({1: model(1)})
    peer.tasks = [train_task()]
    peer.faults = ["incomplete"]
    assert await run(peer, tmp_path) == 0
    assert peer.uploads["t1"].complete
    assert peer.calls.count("PushUpdate") == 2


async def test_a_lost_acknowledgement_makes_no_second_update(tmp_path):
    peer = Peer({1: model(1)})
    peer.tasks = [train_task()]
    peer.faults = [("PushUpdate.acknowledged", LinkError("cut"))]
    assert await run(peer, tmp_path) == 0
    assert peer.uploads["t1"].acknowledged_times == 1
    assert spooled(tmp_path) == []


@pytest.mark.parametrize("call", ["Register", "PollTask", "Heartbeat", "PullModel", "PushUpdate"])
async def test_a_worker_that_the_aggregator_has_forgotten_registers_again(tmp_path, call):
    peer = Peer({1: model(1)})
    peer.tasks = [train_task()]
    peer.faults = [(call, UnknownWorker("who are you?"))]
    assert await run(peer, tmp_path) == 0
    assert peer.uploads["t1"].complete


@pytest.mark.parametrize(
    "error",
    [
        RoundClosed("the deadline has passed"),
        UpdateRefused("its norm is 1e9"),
        LayoutError("weight has the wrong shape"),
        TooLargeError("over the limit"),
        WrongIdentity("another worker's"),
        UnknownTask("no such token"),
    ],
)
async def test_an_update_that_is_refused_for_good_is_dropped_and_the_next_task_is_taken(tmp_path, error):
    peer = Peer({1: model(1)})
    peer.tasks = [train_task("t1"), train_task("t2")]

    async def note(call, note=peer.note):
        await note(call)
        if call == "PushUpdate.chunk" and peer.calls.count(call) == 2:
            await peer.finished("t1")
            raise error

    peer.note = note
    with structlog.testing.capture_logs() as logs:
        assert await run(peer, tmp_path) == 0
    assert spooled(tmp_path) == []
    assert not peer.uploads["t1"].complete
    assert peer.uploads["t2"].complete
    [line] = [line for line in logs if line["event"] == "update refused"]
    assert (line["run"], line["round"], line["worker"]) == ("test-run", 1, "pi-1")
    assert str(error) in line["reason"]


async def test_a_payload_that_rots_on_the_workers_disk_is_dropped_not_sent_for_ever(tmp_path):
    peer = Peer({1: model(1)})
    peer.tasks = [train_task("t1"), train_task("t2")]

    async def note(call, note=peer.note):
        await note(call)
        if call == "PushUpdate" and peer.calls.count(call) == 1:
            payload = tmp_path / "state" / "spool" / "00000001" / "payload"
            payload.write_bytes(bytes(payload.stat().st_size))
            raise CorruptError("the digest does not match")
        if call == "Heartbeat" and spooled(tmp_path) == [] and peer.calls.count("PushUpdate") == 1:
            await peer.finished("t1")

    peer.note = note
    assert await run(peer, tmp_path) == 0
    assert peer.uploads["t2"].complete


async def test_a_paced_link_takes_as_long_as_its_bytes_and_a_slowdown_as_long_as_it_says(tmp_path):
    class Works(Adds):
        def train(self, weights, job):
            for _ in job.batches(4, 1):
                time.sleep(0.02)
            return TrainResult(weights, 4, 4)

    peer = Peer({1: model(1)})
    peer.tasks = [train_task()]
    await run(peer, tmp_path, Works(), throttle=Throttle(slowdown=3, link_bits_per_second=480_000))
    timings = peer.uploads["t1"].header.timings
    assert timings.download_seconds >= 12_048 * 8 / 480_000
    assert timings.local_seconds >= 3 * 4 * 0.02
    assert timings.local_seconds < SOON_S


async def test_an_aggregator_that_hangs_in_the_middle_of_a_stream_is_given_up(tmp_path):
    peer = Peer({1: model(1)})
    peer.tasks = [train_task()]

    async def note(call, note=peer.note):
        await note(call)
        if call in ("PullModel.chunk", "PushUpdate.acknowledge") and peer.calls.count(call) == 1:
            await asyncio.Event().wait()

    peer.note = note
    assert await run(peer, tmp_path, stall_s=1.0) == 0
    assert peer.uploads["t1"].complete


async def test_a_worker_starts_before_its_aggregator_and_finds_it(tmp_path):
    address = free_address()
    peer = Peer({1: model(1)})
    peer.tasks = [train_task()]
    task = asyncio.create_task(run_worker(settings(address, tmp_path), Adds()))
    await asyncio.sleep(0.3)
    async with serving(peer, address):
        assert await asyncio.wait_for(task, PATIENCE_S) == 0
    assert peer.uploads["t1"].complete


async def test_training_goes_on_while_the_aggregator_is_away_and_its_update_arrives_afterwards(tmp_path):
    peer = Peer({1: model(1)})
    peer.tasks = [train_task()]
    gate = threading.Event()
    trainer = Adds(steps=30, gate=gate)
    address = free_address()
    async with serving(peer, address):
        task = asyncio.create_task(run_worker(settings(address, tmp_path), trainer))
        await asyncio.to_thread(trainer.started.wait, PATIENCE_S)
    await asyncio.sleep(0.2)
    gate.set()
    async with serving(peer, address):
        assert await asyncio.wait_for(task, PATIENCE_S) == 0
    assert trainer.trained == 1
    assert peer.uploads["t1"].complete


# The held model.


async def test_a_version_that_is_held_is_not_pulled_twice(tmp_path):
    peer = Peer({1: model(1)})
    peer.tasks = [train_task("t1"), train_task("t2", round=2)]
    await run(peer, tmp_path)
    size = len(peer.payload(1, "raw")[1])
    assert peer.pulled == [(1, 0, 0), (1, size, 0)]
    assert peer.uploads["t2"].complete


async def test_a_newer_version_may_come_as_a_difference_to_the_held_one(tmp_path):
    peer = Peer({1: model(1), 2: model(2), 3: model(3)})
    peer.deltas = {2: 1, 3: 2}
    peer.tasks = [train_task(f"t{version}", version, evaluate=True) for version in (1, 2, 3)]
    await run(peer, tmp_path)
    assert [base for _, _, base in peer.pulled] == [0, 1, 2]
    for version in (1, 2, 3):
        mean = float(model(version)["weight"].mean())
        assert peer.uploads[f"t{version}"].header.evaluation_metrics["mean"] == pytest.approx(mean, abs=1e-6)


async def test_only_the_newest_version_stays_on_the_disk(tmp_path):
    peer = Peer({1: model(1), 2: model(2)})
    peer.tasks = [train_task("t1", 1), train_task("t2", 2)]
    await run(peer, tmp_path)
    names = {path.name for path in (tmp_path / "state" / "model").iterdir()}
    assert {name for name in names if not name.startswith("spare")} == {"00000002"}


async def test_a_version_the_aggregator_no_longer_has_fails_the_task_alone(tmp_path):
    peer = Peer({2: model(2)})
    peer.tasks = [train_task("t1", 1), train_task("t2", 2)]
    assert await run(peer, tmp_path) == 0
    assert "no model version 1" in peer.failures["t1"]
    assert peer.uploads["t2"].complete


# Being told to end, or to wait.


async def test_a_paused_worker_takes_no_task_until_it_is_resumed(tmp_path):
    peer = Peer({1: model(1)}, ends=False)
    async with serving(peer) as server:
        worker = Worker(settings(server.address, tmp_path), lambda _: Adds())
        async with running(worker):
            await peer.until(lambda: "PollTask" in peer.calls)
            worker.pause()
            await asyncio.sleep(0.1)
            await peer.give(train_task())
            await asyncio.sleep(0.3)
            assert peer.pulled == []
            worker.resume()
            await peer.until(lambda: "t1" in peer.uploads and peer.uploads["t1"].complete)


async def test_a_draining_worker_finishes_its_task_and_takes_no_other(tmp_path):
    peer = Peer({1: model(1)}, ends=False)
    peer.tasks = [train_task("t1"), train_task("t2")]
    trainer = Adds(steps=10, gate=threading.Event())
    async with serving(peer) as server:
        worker = Worker(settings(server.address, tmp_path), lambda _: trainer)
        task = asyncio.create_task(worker.run())
        await asyncio.to_thread(trainer.started.wait, PATIENCE_S)
        worker.drain()
        assert await asyncio.wait_for(task, PATIENCE_S) == 0
    assert peer.uploads["t1"].complete
    assert "t2" not in peer.uploads


async def test_a_drain_that_takes_too_long_gives_the_task_back(tmp_path):
    peer = Peer({1: model(1)}, ends=False)
    peer.tasks = [train_task("t1")]
    trainer = Adds(steps=10_000, gate=threading.Event())
    async with serving(peer) as server:
        worker = Worker(settings(server.address, tmp_path), lambda _: trainer)
        task = asyncio.create_task(worker.run())
        await asyncio.to_thread(trainer.started.wait, PATIENCE_S)
        worker.drain(within_s=0.2, exit_code=143)
        assert await asyncio.wait_for(task, PATIENCE_S) == 143
    assert peer.failures["t1"] == "the worker is shutting down"


async def test_an_idle_worker_drains_at_once(tmp_path):
    peer = Peer(ends=False)
    async with serving(peer) as server:
        worker = Worker(settings(server.address, tmp_path), lambda _: Adds())
        task = asyncio.create_task(worker.run())
        await peer.until(lambda: "PollTask" in peer.calls)
        worker.drain()
        assert await asyncio.wait_for(task, SOON_S) == 0


async def test_a_user_task_that_hangs_does_not_keep_the_worker_alive(tmp_path):
    class Hangs(Adds):
        def train(self, weights, job):
            self.started.set()
            time.sleep(2 * PATIENCE_S)

    peer = Peer({1: model(1)}, ends=False)
    peer.tasks = [train_task("t1")]
    trainer = Hangs()
    async with serving(peer) as server:
        worker = Worker(settings(server.address, tmp_path), lambda _: trainer)
        task = asyncio.create_task(worker.run())
        await asyncio.to_thread(trainer.started.wait, PATIENCE_S)
        worker.stop(130)
        assert await asyncio.wait_for(task, SOON_S) == 130


async def test_a_worker_may_stay_when_the_run_has_ended(tmp_path):
    peer = Peer()
    async with serving(peer) as server:
        worker = Worker(
            settings(server.address, tmp_path, exit_when_run_ends=False, poll_wait_s=0.1), lambda _: Adds()
        )
        async with running(worker) as task:
            await peer.until(lambda: peer.calls.count("PollTask") >= 3)
            assert not task.done()


async def test_two_workers_cannot_share_a_folder(tmp_path):
    peer = Peer(ends=False)
    async with serving(peer) as server:
        worker = Worker(settings(server.address, tmp_path), lambda _: Adds())
        async with running(worker):
            await peer.until(lambda: "PollTask" in peer.calls)
            with pytest.raises(UsageError, match="another worker"):
                await run_worker(settings(server.address, tmp_path), Adds())


async def test_a_name_the_aggregator_refuses_ends_the_worker_with_its_reason(tmp_path):
    peer = Peer()
    peer.faults = [("Register", UsageError("the name pi-1 is taken"))]
    with pytest.raises(UsageError, match="pi-1 is taken"):
        await run(peer, tmp_path)


async def test_the_trainer_may_be_built_from_what_the_aggregator_tells(tmp_path):
    told = []

    def build(registration):
        told.append(registration)
        return Adds()

    peer = Peer({1: model(1)})
    peer.tasks = [train_task()]
    async with serving(peer) as server:
        await run_worker(settings(server.address, tmp_path), build_trainer=build)
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
from fedgrpc.worker.run import run_worker
from fedgrpc.worker.settings import WorkerSettings
from fedgrpc.worker.throttle import Throttle
from tests.worker.test_loop import Adds

settings = WorkerSettings("pi-1", sys.argv[1], Path(sys.argv[2]) / "state", drain_s=float(sys.argv[3]),
                          serve_address=None, throttle=Throttle(link_bits_per_second=float(sys.argv[4])))
sys.exit(asyncio.run(run_worker(settings, Adds())))
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
    peer = Peer({1: model(1, size=30_000)})
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
    peer = Peer({1: model(1, size=30_000)})
    peer.tasks = [train_task()]
    async with serving(peer) as server:
        with worker_process(server.address, tmp_path, rate=1_000_000) as process:
            await peer.until(lambda: peer.calls.count("PushUpdate.chunk") >= 5)
            process.send_signal(signal.SIGTERM)
            assert await exit_code(process) == 0
    assert peer.uploads["t1"].complete


async def test_a_second_sigterm_ends_the_process_at_once_and_keeps_the_update(tmp_path):
    peer = Peer({1: model(1, size=30_000)})
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
