"""A worker's life when all goes well: pull, train, score, push, and what it then holds."""

import asyncio
import threading

import numpy as np
import pytest

from fedgrpc.trainer import TrainResult
from fedgrpc.v1 import round_pb2
from fedgrpc.worker.process import Worker, run_worker
from fedgrpc.worker.throttle import Throttle
from tests.support.fake_aggregator import PATIENCE_S, FakeAggregator, model, serving, train_task
from tests.support.running_worker import AddOneTrainer, run_against, running_worker, spooled, worker_settings


async def test_a_task_is_pulled_trained_and_pushed_as_a_difference(tmp_path):
    peer = FakeAggregator({1: model(1)})
    peer.tasks = [train_task()]
    assert await run_against(peer, tmp_path) == 0
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
    peer = FakeAggregator()
    await run_against(
        peer, tmp_path, device={"device_class": "raspberry-pi-4"}, throttle=Throttle(link_bits_per_second=1e6)
    )
    request = peer.registered["pi-1"]
    assert request.device.device_class == "raspberry-pi-4"
    assert request.device.uplink_bits_per_second == 1_000_000
    assert request.device.cpu_cores >= 1
    assert "int8" in request.encodings


async def test_the_pulled_model_is_scored_before_training_when_the_plan_says_so(tmp_path):
    peer = FakeAggregator({1: model(1)})
    peer.tasks = [train_task(evaluate=True)]
    await run_against(peer, tmp_path)
    header = peer.uploads["t1"].header
    assert header.evaluation_metrics["mean"] == pytest.approx(float(model(1)["weight"].mean()))
    assert header.evaluation_example_count == 16


async def test_the_trained_model_is_scored_after_training_where_the_pulled_one_was(tmp_path):
    peer = FakeAggregator({1: model(1), 2: model(2)})
    peer.tasks = [train_task("t1", evaluate=True), train_task("t2", 2)]
    await run_against(peer, tmp_path)
    metrics = peer.uploads["t1"].header.metrics
    assert metrics["local_mean"] == pytest.approx(float(model(1)["weight"].mean()) + 1)
    assert metrics["train_loss"] == 0.5
    assert peer.uploads["t2"].header.metrics == {"train_loss": 0.5}


async def test_an_evaluation_carries_scores_and_no_tensors(tmp_path):
    peer = FakeAggregator({1: model(1)})
    peer.tasks = [train_task(kind=round_pb2.TASK_KIND_EVALUATE)]
    trainer = AddOneTrainer()
    await run_against(peer, tmp_path, trainer)
    header = peer.uploads["t1"].header
    assert len(header.manifest.entries) == 0
    assert header.evaluation_metrics.keys() == {"mean"}
    assert (header.example_count, header.evaluation_example_count, trainer.trained) == (16, 16, 0)


async def test_initial_weights_are_sent_themselves(tmp_path):
    peer = FakeAggregator()
    peer.tasks = [train_task(kind=round_pb2.TASK_KIND_INITIALIZE, round=0)]
    await run_against(peer, tmp_path)
    tensors = peer.uploads["t1"].tensors()
    assert all(np.array_equal(tensors[name], array) for name, array in model(42).items())
    assert peer.pulled == []


async def test_what_a_lossy_encoding_lost_is_in_the_next_update(tmp_path):
    """arXiv 1901.09847: with error feedback the sum of what was sent follows the sum of the deltas."""

    class Drifts(AddOneTrainer):
        def train(self, weights, job):
            rng = np.random.default_rng(7)
            trained = {
                name: array + rng.normal(size=array.shape).astype(array.dtype) for name, array in weights.items()
            }
            return TrainResult(trained, 1, 1)

    peer = FakeAggregator({1: model(1)})
    rounds = 12
    peer.tasks = [train_task(f"t{n}", upload_recipe="int2", round=n) for n in range(rounds)]
    await run_against(peer, tmp_path, Drifts())
    rng = np.random.default_rng(7)
    delta = rng.normal(size=(300, 10)).astype(np.float32)
    sent = sum(peer.uploads[f"t{n}"].tensors()["weight"].astype(np.float64) for n in range(rounds))
    alone = peer.uploads["t0"].tensors()["weight"] - delta
    together = sent / rounds - delta
    assert np.abs(together).mean() < 0.35 * np.abs(alone).mean()


async def test_heartbeats_carry_the_phase_and_the_progress(tmp_path):
    peer = FakeAggregator({1: model(1)})
    peer.tasks = [train_task()]
    # Slow enough that every phase lasts: one that is over at once is not reported.
    throttle = Throttle(link_bits_per_second=160_000)
    await run_against(peer, tmp_path, AddOneTrainer(steps=60, gate=threading.Event()), throttle=throttle)
    phases = [phase for _, phase, _ in peer.beats]
    assert round_pb2.TASK_PHASE_TRAINING in phases
    assert phases[-1] == round_pb2.TASK_PHASE_UPLOADING
    training = [progress for _, phase, progress in peer.beats if phase == round_pb2.TASK_PHASE_TRAINING]
    assert training == sorted(training)
    assert 0.3 < training[-1] <= 1


async def test_a_cancelled_task_stops_between_batches_and_the_worker_takes_the_next(tmp_path):
    peer = FakeAggregator({1: model(1)}, ends=False)
    peer.tasks = [train_task("t1")]
    trainer = AddOneTrainer(steps=10_000, gate=threading.Event())
    async with (
        serving(peer) as server,
        running_worker(Worker(worker_settings(server.address, tmp_path), lambda _: trainer)),
    ):
        await asyncio.to_thread(trainer.started.wait, PATIENCE_S)
        trainer.steps = 1
        peer.cancelled["t1"] = "the round is closed"
        peer.tasks = [train_task("t2")]
        await peer.until(lambda: "t2" in peer.uploads)
        assert "t1" not in peer.uploads
        assert "t1" not in peer.failures


async def test_training_stops_when_the_lease_is_gone(tmp_path):
    peer = FakeAggregator({1: model(1)})
    peer.tasks = [train_task("t1")]
    trainer = AddOneTrainer(steps=10_000, gate=threading.Event())
    async with serving(peer) as server:
        task = asyncio.create_task(run_worker(worker_settings(server.address, tmp_path), trainer))
        await asyncio.to_thread(trainer.started.wait, PATIENCE_S)
        peer.tasks = []
        assert await asyncio.wait_for(task, PATIENCE_S) == 0
    assert trainer.trained == 0


# The held model.


async def test_a_version_that_is_held_is_not_pulled_twice(tmp_path):
    peer = FakeAggregator({1: model(1)})
    peer.tasks = [train_task("t1"), train_task("t2", round=2)]
    await run_against(peer, tmp_path)
    assert peer.pulled == [(1, 0, 0), (1, 0, 1)]
    assert peer.uploads["t2"].complete


async def test_a_newer_version_may_come_as_a_difference_to_the_held_one(tmp_path):
    peer = FakeAggregator({1: model(1), 2: model(2), 3: model(3)})
    peer.deltas = {2: 1, 3: 2}
    peer.tasks = [train_task(f"t{version}", version, evaluate=True) for version in (1, 2, 3)]
    await run_against(peer, tmp_path)
    assert [base for _, _, base in peer.pulled] == [0, 1, 2]
    for version in (1, 2, 3):
        mean = float(model(version)["weight"].mean())
        assert peer.uploads[f"t{version}"].header.evaluation_metrics["mean"] == pytest.approx(mean, abs=1e-6)


async def test_only_the_newest_version_stays_on_the_disk(tmp_path):
    peer = FakeAggregator({1: model(1), 2: model(2)})
    peer.tasks = [train_task("t1", 1), train_task("t2", 2)]
    await run_against(peer, tmp_path)
    names = {path.name for path in (tmp_path / "state" / "model").iterdir()}
    assert {name for name in names if not name.startswith("recycled")} == {"00000002"}


async def test_a_version_the_aggregator_no_longer_has_fails_the_task_alone(tmp_path):
    peer = FakeAggregator({2: model(2)})
    peer.tasks = [train_task("t1", 1), train_task("t2", 2)]
    assert await run_against(peer, tmp_path) == 0
    assert "no model version 1" in peer.failures["t1"]
    assert peer.uploads["t2"].complete
