"""Aggregators, workers and clients within a program, in both forms: the run is a real one."""

from __future__ import annotations

import asyncio
import inspect
import runpy
import threading
from pathlib import Path

import numpy as np
import pytest

from fedgrpc import Aggregator, Client, Worker, load_model
from fedgrpc.api.client import BlockingClient
from fedgrpc.errors import LinkError, NotFound, TaskError, UsageError
from fedgrpc.trainer import EvalResult, TrainResult
from tests.support.command_line import EXAMPLES
from tests.support.running_federation import ShiftTrainer

RUN = {"rounds": 2, "min_workers": 2, "encoding": "raw", "evaluate": False, "durable": False}
SMALL = {"w": np.zeros(4, np.float32)}


class Shift:
    """A learning task whose training adds `change`."""

    def __init__(self, change: float = 1.0) -> None:
        self.change = change

    def initial_weights(self):
        return dict(SMALL)

    def train(self, weights, job):
        return TrainResult({name: array + np.float32(self.change) for name, array in weights.items()}, 10, 1)

    def evaluate(self, weights):
        return EvalResult(10, {"mean": float(weights["w"].mean())})


class Broken(Shift):
    def __init__(self) -> None:
        raise ValueError("no data today")


async def test_an_aggregator_and_workers_in_one_event_loop(tmp_path):
    async with Aggregator(tmp_path / "data", **RUN) as aggregator:
        workers = [Worker(aggregator, Shift, name=f"pi-{n}") for n in (1, 2)]
        await asyncio.gather(*(worker.run() for worker in workers))
        run = await aggregator.until_ended()
        assert (run.phase, run.version, run.ended) == ("finished", 3, True)
        assert (await aggregator.client.model())["w"].tolist() == [2.0] * 4
    # What the data folder has outlives the aggregator.
    assert load_model(tmp_path / "data")["w"].tolist() == [2.0] * 4


def test_the_blocking_form_plays_the_same_run():
    with Aggregator(**RUN) as aggregator:
        with (
            Worker(aggregator, Shift, name="pi-1", option={"change": 3.0}) as worker,
            Worker(aggregator, ShiftTrainer(weights=SMALL), name="pi-2"),
        ):
            assert worker.name == "pi-1"
            run = aggregator.until_ended()
            worker.until_ended()
        assert run.version == 3
        # The mean of 3 and 1, twice.
        assert aggregator.client.model("final")["w"].tolist() == [4.0] * 4
    assert aggregator.model(1)["w"].tolist() == [0.0] * 4
    assert not [thread.name for thread in threading.enumerate() if thread.name == "fedgrpc"]


async def test_the_blocking_form_works_beside_a_running_event_loop():
    """As in a notebook, whose cells run within one."""
    aggregator = Aggregator(**RUN).start()
    workers = [Worker(aggregator, Shift, name=f"pi-{n}").start() for n in (1, 2)]
    assert aggregator.until_ended().phase == "finished"
    for worker in workers:
        worker.until_ended()
    aggregator.close()
    aggregator.close()


def test_workers_that_are_started_end_with_their_run():
    with Aggregator(**RUN) as aggregator:
        for number in (1, 2):
            Worker(aggregator, Shift, name=f"pi-{number}").start()
        aggregator.until_ended()
        assert {device.name for device in aggregator.client.devices()} == {"pi-1", "pi-2"}


def test_the_example_of_five_workers_has_fifteen_lines_and_learns(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    main = runpy.run_path(str(EXAMPLES / "five_workers.py"))["main"]
    lines = [line for line in inspect.getsource(main).splitlines() if line.strip()]
    model = main()
    assert len(lines) <= 13  # with the two imports, 15
    assert set(model) == {"weight", "bias"}
    assert "round 3: 5 updates" in capsys.readouterr().out


async def test_a_client_returns_records(tmp_path):
    async with Aggregator(tmp_path / "data", **{**RUN, "evaluate": True}) as aggregator:
        await asyncio.gather(*(Worker(aggregator, Shift, name=f"pi-{n}").run() for n in (2, 10)))
        await aggregator.until_ended()
        async with Client(aggregator.address) as client:
            (run,) = await client.runs()
            rounds, devices, models = await client.rounds(), await client.devices(), await client.models()
            assert await client.run() == run
            assert await client.round(1) == rounds[1]
            assert await client.rounds(last=1) == rounds[-1:]
            with pytest.raises(NotFound):
                await client.round(99)
            path = await client.download(tmp_path / "best.safetensors", "best")
        async with Client(data_dir=tmp_path / "data") as local:
            assert [each.name for each in await local.runs()] == ["default"]
    assert (run.phase, run.rounds, run.started_at.tzinfo is not None) == ("finished", 2, True)
    trained = [each for each in rounds if each.kind == "train"]
    assert [(each.number, each.phase, each.updates, each.version) for each in trained] == [
        (1, "committed", 2, 2),
        (2, "committed", 2, 3),
    ]
    assert trained[0].metrics == {"mean": 1.0} or trained[1].metrics == {"mean": 1.0}
    assert {task.device for task in trained[0].tasks} == {"pi-2", "pi-10"}
    assert trained[0].upload_bytes == sum(task.upload_bytes for task in trained[0].tasks) > 0
    assert [(device.name, device.role, device.accepted) for device in devices] == [
        ("pi-2", "trainer", 4),
        ("pi-10", "trainer", 4),
    ] or [device.name for device in devices] == ["pi-2", "pi-10"]
    assert [(each.version, each.latest) for each in models][-1] == (3, True)
    assert load_model(path)["w"].shape == (4,)
    assert load_model("@1", data_dir=tmp_path / "data")["w"].tolist() == [0.0] * 4


async def test_an_aggregator_without_a_run_of_its_own_takes_submitted_ones(tmp_path):
    async with Aggregator(tmp_path / "data") as aggregator:
        assert await aggregator.client.runs() == ()
        submitted = await aggregator.client.submit("night", rounds=1, min_workers=1, encoding="raw", priority=3)
        assert (submitted.name, submitted.phase, submitted.priority) == ("night", "running", 3)
        night = aggregator.client.of("night")
        assert await night.change(priority=4) == {"priority": "3 -> 4"}
        async with Worker(aggregator, Shift, name="pi-1", poll_wait="1s"):
            assert (await night.until_ended()).version == 2
        assert (await night.model())["w"].tolist() == [1.0] * 4
        with pytest.raises(UsageError, match="no setting"):
            await aggregator.client.submit("day", round=1)
        await night.remove()
        assert not await aggregator.client.runs()


def test_every_method_of_a_client_blocks_in_the_blocking_form():
    def public(kind):
        return {name for name in vars(kind) if not name.startswith("_")}

    calls = {name for name in public(Client) if inspect.iscoroutinefunction(getattr(Client, name))}
    assert calls <= public(BlockingClient)
    for name in calls:
        assert inspect.signature(getattr(Client, name)) == inspect.signature(getattr(BlockingClient, name))


def test_settings_that_cannot_be_are_refused_when_they_are_given():
    with pytest.raises(UsageError, match="did you mean 'rounds'"):
        Aggregator(round=3)
    with pytest.raises(UsageError, match="deadline"):
        Aggregator(deadline="soon")
    with pytest.raises(UsageError, match="lacks initial_weights"):
        Worker("127.0.0.1:1", dict)
    with pytest.raises(UsageError, match="worker name"):
        Worker("127.0.0.1:1", Shift, name="a/b")
    with pytest.raises(UsageError, match="one of"):
        Client("127.0.0.1:1", data_dir="data")
    with pytest.raises(UsageError, match="not open"):
        _ = Client().calls


async def test_an_aggregator_that_is_open_is_not_opened_twice(tmp_path):
    aggregator = Aggregator(tmp_path / "data", **RUN)
    async with aggregator:
        with pytest.raises(UsageError, match="open already"):
            await aggregator.__aenter__()
        with pytest.raises(UsageError, match="in use"):
            await Aggregator(tmp_path / "data", **RUN).__aenter__()
    async with aggregator:
        pass


async def test_an_error_of_the_learning_task_reaches_whoever_waits(tmp_path):
    async with Aggregator(**RUN) as aggregator:
        with pytest.raises(TaskError, match="no data today"):
            await Worker(aggregator, Broken, name="pi-1").run()


def test_a_client_of_no_aggregator_says_where_it_looked(tmp_path):
    with pytest.raises(LinkError, match=r"127\.0\.0\.1:9"), Client("127.0.0.1:9") as client:
        client.runs()
    with pytest.raises(LinkError, match="data folder"), Client(data_dir=tmp_path):
        pass


def test_load_model_says_what_is_missing(tmp_path):
    with pytest.raises(UsageError, match="no model"):
        load_model(tmp_path / "none.safetensors")
    with pytest.raises(UsageError, match="not an aggregator's data folder"):
        load_model(tmp_path)
    (tmp_path / "text.safetensors").write_text("this is no model, but a text of some length")
    with pytest.raises(UsageError, match="not a safetensors file"):
        load_model(Path(tmp_path / "text.safetensors"))
