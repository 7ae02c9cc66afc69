"""What a federation computes: FedAvg, and with one worker plain local training."""

import asyncio

import numpy as np
import pytest

from fedgrpc.aggregation.server_optimizer import OPTIMIZERS, server_optimizer
from fedgrpc.trainer import TrainJob, TrainResult
from fedgrpc.training_plan import TrainingPlan
from fedgrpc.worker.task_loader import load_trainer
from tests.support.running_federation import running_aggregator, start_worker


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

    async with running_aggregator(tmp_path, **changes) as running:
        assert await start_worker(running, tmp_path, "alone", Watched()) == 0
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
        async with running_aggregator(folder, policy={"min_workers": 4}) as running:
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


class Fit:
    """Least squares of a worker's own examples; `train` is the loop of any trainer: batches of a job, SGD."""

    def __init__(self, seed, count):
        rng = np.random.default_rng(seed)
        self.x = rng.standard_normal((count, 5))
        self.y = self.x @ rng.standard_normal(5)

    def gradient(self, w, chosen=slice(None)):
        x, y = self.x[chosen], self.y[chosen]
        return x.T @ (x @ w - y) / len(y)

    def initial_weights(self):
        return {"w": np.zeros(5, np.float32)}

    def train(self, weights, job):
        w, steps = weights["w"].astype(np.float64), 0
        for chosen in job.batches(len(self.y), 8):
            w, steps = w - job.learning_rate * self.gradient(w, chosen), steps + 1
        return TrainResult({"w": w.astype(np.float32)}, len(self.y), steps)

    def evaluate(self, weights):
        return None


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
async def test_fedsgd_is_one_step_of_the_servers_optimizer_down_the_gradient_of_all_by_p_m(tmp_path, optimizer):
    """One batch of all examples a round; p_m are the user's, and not the counts of examples."""
    trainers = {"a": Fit(1, 30), "b": Fit(2, 50), "c": Fit(3, 20)}
    p = {"a": 2.0, "b": 0.5, "c": 1.0}
    plan = TrainingPlan(epochs=1, batch_size=1 << 20, learning_rate=0.1, momentum=0.0)
    changes = {"initial_model": None, "plan": plan, "worker_weights": p, "rounds": 3}
    async with running_aggregator(
        tmp_path, policy={"min_workers": 3}, server_optimizer=optimizer, keep_versions=9, **changes
    ) as running:
        codes = await asyncio.gather(*(start_worker(running, tmp_path, n, each) for n, each in trainers.items()))
        assert codes == [0, 0, 0]
        assert all(task.steps == 1 for round_ in (await running.rounds())[-3:] for task in round_.tasks)
        versions = [running.weights(number)["w"] for number in (1, 2, 3, 4)]
    step = server_optimizer(optimizer)
    w, state = np.zeros(5), tuple(np.zeros(5) for _ in range(step.state_count))
    for version in versions[1:]:
        gradient = sum(p[name] * each.gradient(w) for name, each in trainers.items()) / sum(p.values())
        w, state = step.step(w, -0.1 * gradient, state)
        np.testing.assert_allclose(version, w, atol=1e-5)
