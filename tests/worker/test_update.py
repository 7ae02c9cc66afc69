"""Updates that keep to a budget of bytes: a number, or what goes through the worker's link in the time left."""

import asyncio

import numpy as np
import pytest
import structlog

from fedgrpc.codec.recipe import Recipe
from fedgrpc.protocol.durations import duration_to_proto
from fedgrpc.protocol.tasks import task_from_proto
from fedgrpc.rpc.retry import Backoff
from fedgrpc.trainer import TrainResult
from fedgrpc.worker.process import run_worker
from fedgrpc.worker.settings import WorkerSettings
from fedgrpc.worker.update import budget_bytes
from tests.support.fake_aggregator import PATIENCE_S, FakeAggregator, model, serving, train_task

SIZE = 60_000


class Drifts:
    """Adds the same noise each time, and keeps no scores."""

    def train(self, weights, job):
        rng = np.random.default_rng(7)
        moved = {
            name: array + rng.laplace(size=array.shape).astype(array.dtype) for name, array in weights.items()
        }
        return TrainResult(moved, 1, 1)

    def evaluate(self, weights):
        return None


def drift():
    return np.random.default_rng(7).laplace(size=(SIZE // 10, 10)).astype(np.float32)


async def updates_of(tmp_path, *tasks):
    """What came of the tasks: (bytes of the payload, encoding of the weight, the weight's tensor) of each."""
    peer = FakeAggregator({1: model(1, SIZE)})
    peer.tasks = list(tasks)
    async with serving(peer) as server:
        settings = WorkerSettings(
            name="pi-1",
            aggregator=server.address,
            state_dir=tmp_path / "state",
            serve_address=None,
            backoff=Backoff(0.02, 0.1),
        )
        assert await asyncio.wait_for(run_worker(settings, Drifts()), PATIENCE_S) == 0
    found = []
    for task in tasks:
        manifest = peer.uploads[task.token].header.manifest
        spec = next(entry.encoding.spec for entry in manifest.entries if entry.tensor.name == "weight")
        found.append(
            (manifest.size_bytes, Recipe.parse(spec).default, peer.uploads[task.token].tensors()["weight"])
        )
    return found


async def test_an_update_takes_no_more_than_its_budget_and_uses_it(tmp_path):
    budgets = (3_000, 10_000, 30_000)
    recipes = [f"entropy:c=0.05,budget={budget}+zstd" for budget in budgets]
    tasks = [train_task(f"t{n}", upload_recipe=recipe, round=n) for n, recipe in enumerate(recipes)]
    found = await updates_of(tmp_path, *tasks)
    for budget, (size_bytes, encoding, _) in zip(budgets, found, strict=True):
        assert 0.9 * budget < size_bytes <= budget
        # A reader needs to know nothing of budgets.
        assert "budget" not in str(encoding)
    assert found[0][1].c > found[1][1].c > found[2][1].c > 0.05


async def test_an_update_takes_what_goes_through_the_link_in_the_time_left(tmp_path):
    recipe = "entropy:c=0.05,budget=link+zstd"
    known = {"uplink_bytes_per_second": 20.0, "time_left": duration_to_proto(1000)}
    slow, unknown, endless = (
        train_task(token, upload_recipe=recipe, round=n, **about)
        for n, (token, about) in enumerate(
            [
                ("slow", known),
                ("unknown", {**known, "uplink_bytes_per_second": 0.0}),
                ("endless", {"uplink_bytes_per_second": 20.0}),
            ]
        )
    )
    (size_bytes, encoding, _), *others = await updates_of(tmp_path, slow, unknown, endless)
    # 20 bytes a second for 1000 s less what the test takes, and a fifth to spare.
    assert 0.8 * 20 * (1000 - PATIENCE_S) * 0.9 < size_bytes <= 0.8 * 20 * 1000
    assert encoding.c > 0.05
    for _, other, _ in others:
        assert (other.c, other.budget) == (0.05, "")


async def test_a_budget_that_cannot_be_kept_is_said_and_the_smallest_update_sent(tmp_path):
    with structlog.testing.capture_logs() as logs:
        ((size_bytes, encoding, _),) = await updates_of(
            tmp_path, train_task(upload_recipe="entropy:budget=40+zstd", round=3)
        )
    assert encoding.c == 64
    (line,) = [line for line in logs if line["event"] == "update over its budget"]
    assert (line["budget_bytes"], line["bytes"], line["log_level"]) == (40, size_bytes, "warning")


@pytest.mark.parametrize("rounds", [12])
async def test_what_a_budget_made_coarser_is_in_the_next_updates(tmp_path, rounds):
    """arXiv 1901.09847: the sum of what was sent follows the sum of the deltas, whatever step each one had."""
    budgets = [25_000, 9_000] * (rounds // 2)
    tasks = [
        train_task(f"t{n}", upload_recipe=f"entropy:c=0.05,rounding=nearest,budget={budget}+zstd", round=n)
        for n, budget in enumerate(budgets)
    ]
    found = await updates_of(tmp_path, *tasks)
    sent = sum(weight.astype(np.float64) for _, _, weight in found)
    for budget, (size_bytes, _, _) in zip(budgets, found, strict=True):
        assert size_bytes <= budget
    alone = np.abs(found[1][2] - drift()).mean()
    assert np.abs(sent / rounds - drift()).mean() < 0.35 * alone


def test_no_time_left_leaves_no_bytes():
    message = train_task(uplink_bytes_per_second=1000.0, time_left=duration_to_proto(10))
    task = task_from_proto(message)
    assert task.deadline_s is not None
    assert budget_bytes("link", task, task.deadline_s - 10) == pytest.approx(8000)
    assert budget_bytes("link", task, task.deadline_s + 5) == 0
    assert budget_bytes("123", task, 0.0) == 123


async def test_a_recipe_may_send_the_last_layer_finer_and_vectors_raw(tmp_path):
    peer = FakeAggregator(
        {1: {**model(1, 6000), "head": np.ones((80, 10), np.float32), "norm": np.ones(200, np.float32)}}
    )
    peer.tasks = [train_task(upload_recipe="int4;@vectors=raw;@last=int8+zstd")]
    async with serving(peer) as server:
        settings = WorkerSettings(
            name="pi-1", aggregator=server.address, state_dir=tmp_path / "state", serve_address=None
        )
        assert await asyncio.wait_for(run_worker(settings, Shifts()), PATIENCE_S) == 0
    entries = peer.uploads["t1"].header.manifest.entries
    specs = {entry.tensor.name: entry.encoding.spec for entry in entries}
    assert specs == {"weight": "int4", "bias": "raw", "steps": "raw", "head": "int8", "norm": "raw:shuffle=yes"}


class Shifts(Drifts):
    """Moves every float by a little more than the one before it."""

    def train(self, weights, job):
        moved = {n: a + np.linspace(0, 1, a.size).reshape(a.shape).astype(a.dtype) for n, a in weights.items()}
        return TrainResult({**moved, "steps": weights["steps"]}, 1, 1)
