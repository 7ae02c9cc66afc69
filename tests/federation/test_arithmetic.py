"""What a federation computes: FedAvg, and with one worker plain local training."""

import asyncio

import numpy as np
import pytest

from fedgrpc.aggregator.settings import TrainingPlan
from fedgrpc.worker.trainer import TrainJob, load_trainer
from tests.federation.federation import aggregating, working


async def test_one_worker_and_one_epoch_equal_local_training(tmp_path):
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    trainer = load_trainer("fedgrpc.tasks.digits", model="MLP", device="cpu", seed=1)
    plan = TrainingPlan(epochs=1.0, batch_size=32, learning_rate=0.1)
    changes = {"initial_model": None, "plan": plan, "policy": {"min_workers": 1}}
    jobs = []

    class Watched:
        initial_weights, evaluate = trainer.initial_weights, trainer.evaluate

        def train(self, weights, job):
            jobs.append(job)
            return trainer.train(weights, job)

    async with aggregating(tmp_path, **changes) as running:
        assert await working(running, tmp_path, "alone", Watched()) == 0
        federated = running.weights(2)
    (job,) = jobs
    local = trainer.train(
        trainer.initial_weights(),
        TrainJob(epochs=1.0, batch_size=32, learning_rate=0.1, seed=job.seed, round=job.round),
    )
    assert federated.keys() == local.weights.keys()
    for name, values in local.weights.items():
        np.testing.assert_allclose(federated[name], values, atol=1e-6, rtol=0)
    moved = max(np.abs(local.weights[name] - values).max() for name, values in trainer.initial_weights().items())
    assert moved > 0.01


async def test_a_round_is_the_mean_by_examples_whatever_the_order_in_which_updates_come(tmp_path):
    """The bits of the model are the same: three runs, three orders of arrival."""
    rng = np.random.default_rng(5)
    shapes = {"w": (50, 40), "b": (40,)}
    names = ["a", "b", "c", "d"]
    updates = {
        name: {
            **{key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()},
            "n": np.array(7),
        }
        for name in names
    }
    counts = {"a": 3, "b": 50, "c": 1000, "d": 17}
    models = []
    for turn, order in enumerate([names, names[::-1], ["c", "a", "d", "b"]]):
        folder = tmp_path / str(turn)
        folder.mkdir()
        async with aggregating(folder, policy={"min_workers": 4}) as running:
            devices = {name: await running.device(name) for name in names}
            tasks = dict(zip(names, await asyncio.gather(*(devices[n].task() for n in names)), strict=True))
            for name in order:
                await devices[name].push(tasks[name], updates[name], example_count=counts[name])
            await running.until_finished()
            models.append((running.settings.data_dir / "models" / "000002.safetensors").read_bytes())
            weights, base = running.weights(2), running.weights(1)
    assert models[0] == models[1] == models[2]
    total = sum(counts.values())
    for key in shapes:
        mean = sum(counts[name] / total * updates[name][key].astype(np.float64) for name in names)
        np.testing.assert_allclose(weights[key], base[key] + mean, atol=1e-6)
    assert weights["n"] == 7
