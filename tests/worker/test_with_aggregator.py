"""Real workers with the real aggregator, over loopback."""

import asyncio
import functools
from contextlib import asynccontextmanager

import numpy as np
import pytest

from fedgrpc.aggregator.server import Aggregator
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.protocol.tasks import WorkerRole
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.rpc.channel import open_channel
from fedgrpc.rpc.retry import Backoff
from fedgrpc.trainer import EvalResult, TrainResult
from fedgrpc.training_plan import TrainingPlan
from fedgrpc.v1 import aggregator_pb2, aggregator_pb2_grpc, round_pb2
from fedgrpc.worker.process import run_worker
from fedgrpc.worker.settings import WorkerSettings
from tests.support.processes import free_address


class LeastSquares:
    """y = X w with its exact gradient: FedAvg of it has a closed form."""

    def __init__(self, seed, examples=40):
        rng = np.random.default_rng(seed)
        self.x = rng.normal(size=(examples, 200))
        self.y = self.x @ np.linspace(-1, 1, 200) + 0.01 * rng.normal(size=examples)

    def initial_weights(self):
        return {"w": np.zeros(200, np.float32), "calls": np.array(0, np.int64)}

    def gradient_step(self, w):
        return w - 0.01 * self.x.T @ (self.x @ w - self.y) / len(self.y)

    def train(self, weights, job):
        w = weights["w"].astype(np.float64)
        for batch in job.batches(len(self.y), len(self.y)):
            assert len(batch) == len(self.y)
            w = self.gradient_step(w)
        trained = {"w": w.astype(np.float32), "calls": weights["calls"] + 1}
        return TrainResult(trained, len(self.y), 1, {"train_loss": self.loss(w)})

    def loss(self, w):
        return float(np.mean((self.x @ w - self.y) ** 2))

    def evaluate(self, weights):
        return EvalResult(len(self.y), {"loss": self.loss(weights["w"])})


@asynccontextmanager
async def aggregating(tmp_path, **changes):
    policy = RoundPolicy(**{"min_workers": 3, "deadline_s": 600.0, "lease_s": 120.0, **changes.pop("policy", {})})
    settings = AggregatorSettings(
        **{
            "data_dir": tmp_path / "aggregator",
            "address": "127.0.0.1:0",
            "rounds": 4,
            "policy": policy,
            "download_recipe": "raw",
            "upload_recipe": "raw",
            **changes,
        }
    )
    ready = asyncio.get_running_loop().create_future()
    aggregator = Aggregator(settings)
    task = asyncio.create_task(aggregator.run(ready.set_result))
    done, _ = await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
    if task in done:
        task.result()
    stop_once = functools.lru_cache(aggregator.stop)  # A second call would end this process at once.
    try:
        yield f"127.0.0.1:{ready.result()}", stop_once, task
    finally:
        if not task.done():
            stop_once()
        await asyncio.wait_for(task, 120)


def worker(address, tmp_path, number, trainer, **changes):
    settings = WorkerSettings(
        name=f"pi-{number}",
        aggregator=address,
        state_dir=tmp_path / f"pi-{number}",
        serve_address=None,
        backoff=Backoff(0.05, 0.5),
        **changes,
    )
    return run_worker(settings, trainer)


async def rounds_of(address):
    async with open_channel(address) as channel:
        stub = aggregator_pb2_grpc.AggregatorStub(channel)
        return list((await stub.ListRounds(aggregator_pb2.ListRoundsRequest())).rounds)[::-1]


async def registered(address, name):
    async with open_channel(address) as channel:
        stub = aggregator_pb2_grpc.AggregatorStub(channel)
        request = aggregator_pb2.ListWorkersRequest()
        async with asyncio.timeout(120):
            while True:
                known = (await stub.ListWorkers(request)).workers
                if name in [worker.worker for worker in known]:
                    return
                await asyncio.sleep(0.05)


async def round_reached(address, number):
    async with open_channel(address) as channel:
        stub = aggregator_pb2_grpc.AggregatorStub(channel)
        async for message in stub.WatchRounds(aggregator_pb2.WatchRoundsRequest(max_rate_hz=20)):
            if message.round.number >= number:
                return


def closed_form(trainers, rounds):
    """McMahan et al., arXiv 1602.05629, with one full-batch step: the mean weighted by examples."""
    w = np.zeros(200)
    for _ in range(rounds):
        total = sum(len(trainer.y) for trainer in trainers)
        w = sum(len(trainer.y) / total * trainer.gradient_step(w) for trainer in trainers)
    return w


async def final_weights(address, tmp_path):
    from safetensors.numpy import load_file

    return load_file(sorted((tmp_path / "aggregator").rglob("*.safetensors"))[-1])


@pytest.mark.parametrize(
    ("recipes", "tolerance"),
    [
        (("raw", "raw"), 1e-6),
        (("raw+zstd", "raw+zstd"), 1e-6),
        (("raw", "int8+zstd"), 2e-3),
        (("int8+zstd", "int8+zstd"), 4e-3),
    ],
)
async def test_a_federation_of_three_is_the_closed_form_of_fedavg(tmp_path, recipes, tolerance):
    trainers = [LeastSquares(seed, examples) for seed, examples in enumerate((20, 40, 100))]
    download, upload = recipes
    async with aggregating(tmp_path, download_recipe=download, upload_recipe=upload) as (address, _, task):
        codes = await asyncio.gather(
            *(worker(address, tmp_path, number, trainer) for number, trainer in enumerate(trainers))
        )
        await asyncio.wait_for(asyncio.shield(task), 120)
    assert codes == [0, 0, 0]
    weights = await final_weights(address, tmp_path)
    assert np.abs(weights["w"] - closed_form(trainers, 4)).max() < tolerance
    assert weights["calls"] == 4


async def test_workers_that_start_first_find_the_aggregator_and_survive_its_restart(tmp_path):
    trainers = [LeastSquares(seed) for seed in range(3)]
    # Not one of the ports that the system gives to whoever dials, such as a worker whose aggregator is away.
    place = {"rounds": 30, "plan": TrainingPlan(epochs=1), "address": free_address()}
    async with aggregating(tmp_path, **place) as (address, stop, _):
        workers = [
            asyncio.create_task(worker(address, tmp_path, number, trainer))
            for number, trainer in enumerate(trainers)
        ]
        await round_reached(address, 5)
        stop()
    await asyncio.sleep(0.3)
    async with aggregating(tmp_path, **place) as (_, _, task):
        codes = await asyncio.wait_for(asyncio.gather(*workers), 120)
        await asyncio.wait_for(asyncio.shield(task), 120)
    assert codes == [0, 0, 0]
    weights = await final_weights(address, tmp_path)
    assert np.abs(weights["w"] - closed_form(trainers, 30)).max() < 1e-5


async def test_a_worker_whose_task_raises_costs_the_round_nothing_but_its_share(tmp_path):
    class Broken(LeastSquares):
        def train(self, weights, job):
            raise RuntimeError("out of luck")

    trainers = [LeastSquares(0), LeastSquares(1), Broken(2)]
    policy = {"quorum": 2}
    async with aggregating(tmp_path, rounds=2, policy=policy, stay=True) as (address, _, _):
        await asyncio.gather(
            *(worker(address, tmp_path, number, trainer) for number, trainer in enumerate(trainers))
        )
        rounds = await rounds_of(address)
    reasons = [task.reason for item in rounds for task in item.tasks if task.worker == "pi-2"]
    assert any("RuntimeError: out of luck" in reason for reason in reasons)


async def test_an_evaluator_scores_committed_versions(tmp_path):
    trainers = [LeastSquares(seed) for seed in range(3)]
    async with aggregating(tmp_path, rounds=6, stay=True) as (address, _, _):
        scoring = asyncio.create_task(worker(address, tmp_path, 9, LeastSquares(9), role=WorkerRole.EVALUATOR))
        await registered(address, "pi-9")
        await asyncio.gather(
            scoring,
            *(worker(address, tmp_path, number, trainer) for number, trainer in enumerate(trainers)),
        )
        rounds = await rounds_of(address)
    scored = [item.evaluator_metrics["loss"] for item in rounds if "loss" in item.evaluator_metrics]
    assert scored
    assert scored[-1] <= scored[0]
    assert all(task.phase == round_pb2.TASK_PHASE_ACCEPTED for item in rounds for task in item.tasks)
