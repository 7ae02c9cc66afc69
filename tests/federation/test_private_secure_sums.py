"""Secure sums that are released with noise: what a device adds, what a version is, and what its ledger says."""

import asyncio
import signal
import threading
from contextlib import closing

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedgrpc.aggregator.private_releases import KEY_FILE
from fedgrpc.aggregator.secure_sums import BOUNDS
from fedgrpc.privacy.bounded_rounding import grid_bound
from fedgrpc.privacy.noise import RoundNoise
from fedgrpc.privacy.policy import PrivacyPolicy
from fedgrpc.privacy.secure_policy import SecurePolicy
from fedgrpc.privacy.secure_vector import SecureVector
from fedgrpc.storage.database import DATABASE
from fedgrpc.storage.model_file import ModelFile
from fedgrpc.storage.run_store import RunStore
from fedgrpc.v1 import round_pb2
from tests.support.processes import aggregator_process, free_address
from tests.support.running_federation import ShiftTrainer, running_aggregator, start_worker
from tests.support.watched_sums import Watched

MODEL = {"a": np.zeros((3, 5), np.float32), "w": np.linspace(-1, 1, 301, dtype=np.float32)}
SIZE = sum(array.size for array in MODEL.values())
PRIVATE = {
    "privacy": PrivacyPolicy("gaussian", noise_multiplier=0.5, cohort=8),
    "secure": SecurePolicy(secure_bits=8),
    "clip_norm": 2.0,
}


def changes_for(tmp_path, count=3, **changes):
    save_file(MODEL, tmp_path / "initial.safetensors")
    policy = {"min_workers": count, "quorum": 3, **changes.pop("policy", {})}
    return {**PRIVATE, **changes, "policy": policy}


def stored(tmp_path):
    with closing(RunStore(tmp_path / "aggregator" / DATABASE, read_only=True)) as store:
        return store.releases()


def noise_of(tmp_path, step, name, deviation=0.5 * 2.0 / 8):
    key = (tmp_path / "aggregator" / KEY_FILE).read_bytes()
    return deviation * RoundNoise(key, step).normals(name, MODEL[name].size).reshape(MODEL[name].shape)


async def test_a_version_is_the_secure_sum_over_the_cohort_plus_the_noise_of_its_step(tmp_path, monkeypatch):
    watched = Watched(monkeypatch)
    async with running_aggregator(tmp_path, **changes_for(tmp_path, rounds=2)) as running:
        # Of these differences the first is short, and the others are clipped.
        workers = [start_worker(running, tmp_path, f"w{k}", ShiftTrainer((0.01, 1.0, -9.0)[k])) for k in range(3)]
        run = await running.until_finished()
        weights = [running.weights(number) for number in (2, run.model_version)]
        about = ModelFile.open(running.settings.data_dir / "models" / "000002.safetensors").about(BOUNDS)
    await asyncio.gather(*workers)
    before = MODEL
    for step, (sum_, total) in enumerate(watched.sums, start=1):
        vector = sum_.vector
        own = watched.plain[3 * step - 3 : 3 * step]
        assert np.array_equal(total, sum(own))
        # Each rounded update is within the clip norm, which is the sensitivity of the release.
        lengths = [np.linalg.norm(2.0 * each[:-1] - 255) * vector.bounds["w"] / 255 for each in own]
        assert max(lengths) <= 2.0
        assert sorted(lengths)[1] > 1.7
        # The shifts that are left of 1.0 and -9.0 cancel.
        expected = 0.01 / 8
        for name in MODEL:
            moved = weights[step - 1][name] - before[name] - noise_of(tmp_path, step, name)
            np.testing.assert_allclose(moved, expected, atol=3 * 2 * vector.bounds["w"] / 255 / 8)
            shares = vector.shares(total, 3, 8)[name]
            np.testing.assert_allclose(moved, shares, rtol=1e-4, atol=1e-6)
        before = weights[step - 1]
    entries = stored(tmp_path)
    assert [(each.step, each.count, each.rules.clip_norm) for each in entries] == [(1, 3, 2.0), (2, 3, 2.0)]
    # No bounds that follow from a mean without noise travel with a version, and none are used.
    assert not about
    assert watched.sums[0][0].vector.bounds == watched.sums[1][0].vector.bounds


async def test_a_sum_that_began_under_a_longer_clip_norm_is_not_released(tmp_path):
    """The aggregator restarts with a shorter one while devices train: nobody can clip their updates any more."""
    going_on = threading.Event()

    class Waiting(ShiftTrainer):
        def train(self, weights, job):
            while not (going_on.is_set() or job.stop()):
                going_on.wait(0.05)
            return super().train(weights, job)

    save_file(MODEL, tmp_path / "initial.safetensors")
    address = free_address()
    noise = ["--privacy", "gaussian", "--noise-multiplier", 1, "--privacy-cohort", 4]
    arguments = [*noise, "--secure-aggregation", 8, "--quorum", 3, "--min-workers", 3, "--rounds", 1]
    async with aggregator_process(tmp_path, *arguments, "--clip-norm", 2, address=address) as (process, running):
        workers = [start_worker(running, tmp_path, f"w{k}", Waiting(0.1)) for k in range(3)]
        for k in range(3):
            await running.until_task(f"w{k}", round_pb2.TASK_PHASE_TRAINING)
        process.send(signal.SIGKILL)
        await process.ended()
    async with aggregator_process(tmp_path, *arguments, "--clip-norm", 1, address=address) as (process, running):
        await process.until("round resumed")
        going_on.set()
        record = await running.until_ended(1)
        assert record.phase == round_pb2.ROUND_PHASE_ABANDONED
        assert "clip norm" in record.reason
        assert not stored(tmp_path)
        # The next one is of devices that were told.
        await running.until_finished()
        assert [each.rules.clip_norm for each in stored(tmp_path)] == [1.0]
    for worker in workers:
        worker.cancel()
    await asyncio.gather(*workers, return_exceptions=True)


@pytest.mark.faults
async def test_an_aggregator_killed_behind_an_entry_unmasks_the_same_sum_under_the_same_noise(
    tmp_path, monkeypatch
):
    watched = Watched(monkeypatch)
    save_file(MODEL, tmp_path / "initial.safetensors")
    address = free_address()
    noise = ["--privacy", "gaussian", "--noise-multiplier", 0.5, "--privacy-cohort", 8, "--clip-norm", 2]
    arguments = [*noise, "--secure-aggregation", 8, "--quorum", 3, "--min-workers", 3, "--rounds", 2]
    # In round 2: the devices have answered, and the release is in the ledger.
    killing = ("-m", "tests.faults.killed_at", "release-entered")
    async with aggregator_process(tmp_path, *arguments, address=address, program=killing) as (process, _):
        workers = [start_worker(address, tmp_path, f"w{k}", ShiftTrainer(0.01 * (k + 1))) for k in range(3)]
        assert await process.ended() == -signal.SIGKILL
    assert [each.step for each in stored(tmp_path)] == [1, 2]
    async with aggregator_process(tmp_path, *arguments, address=address) as (process, running):
        await process.until("round resumed")
        await running.until_finished()
        weights = running.weights(3)
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    # Nobody has masked a second update.
    assert len(watched.plain) == 6
    assert [(each.step, each.round) for each in stored(tmp_path)] == [(1, 1), (2, 2)]
    shapes, bound = {name: array.shape for name, array in MODEL.items()}, grid_bound(2.0, SIZE, 8)
    vector, expected = SecureVector(shapes, dict.fromkeys(shapes, bound), 8, 0, 3, norm=2.0), dict(MODEL)
    for step in (1, 2):
        shares = vector.shares(sum(watched.plain[3 * step - 3 : 3 * step]), 3, 8)
        for name in MODEL:
            moved = expected[name] + shares[name] + noise_of(tmp_path, step, name)
            expected[name] = moved.astype(np.float32)
    for name in MODEL:
        np.testing.assert_allclose(weights[name], expected[name], rtol=1e-6, atol=1e-7)
