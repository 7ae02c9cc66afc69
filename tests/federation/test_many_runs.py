"""One aggregator with many runs: submitted, served by one fleet, changed, and taken up by the next process."""

import asyncio
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from fedgrpc.aggregator.server import Aggregator, Hosting
from fedgrpc.cli.aggregator import COMMAND, run_settings, run_texts
from fedgrpc.client import connect
from fedgrpc.errors import IllegalTransition, NotFound, UsageError
from fedgrpc.v1 import aggregator_pb2 as pb
from tests.support.hand_driven_device import PATIENCE_S
from tests.support.running_federation import ShiftTrainer, settings_for, start_worker

QUICK = {
    "min_workers": "2",
    "selection_window": "0.2s",
    "evaluate": "false",
    "encoding": "raw",
    "keep_versions": "20",
    "reconnect_grace": "0.5s",
}


def process_values():
    """Values of the process's settings, as a command line without any flag has them."""
    return COMMAND.values_of({}, {"data_dir": Path("unused"), "run_name": "unused", "config": None})


@asynccontextmanager
async def hosting(folder, drained=True):
    """An aggregator without a run of its own, and a client of it. Unless `drained` it ends as a kill ends it."""
    settings = replace(settings_for(folder), initial_model=None)
    given = {**process_values(), "durable": False, "drain_s": 1.0}
    host = Hosting(False, partial(run_settings, given), run_texts)
    ready = asyncio.get_running_loop().create_future()
    aggregator = Aggregator(settings, hosting=host)
    task = asyncio.create_task(aggregator.run(ready.set_result))
    await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
    address = f"127.0.0.1:{ready.result()}"
    try:
        async with connect(address) as client:
            yield address, client, aggregator
    finally:
        if drained:
            aggregator.stop()
        else:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.wait_for(task, PATIENCE_S)


async def until(client, condition):
    """Wait until the list of runs, by name, meets the condition."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            runs = {run.name: run for run in await client.runs()}
            if condition(runs):
                return runs
            await asyncio.sleep(0.1)


@pytest.fixture
def workers(tmp_path):
    """Starts real workers that add 1 to every float; they are ended with the test."""
    started = []

    def start(address, *names, **changes):
        for name in names:
            trainer = ShiftTrainer(weights={"w": np.zeros(4, np.float32)})
            started.append(start_worker(address, tmp_path, name, trainer, **{"poll_wait_s": 2.0, **changes}))
        return started

    yield start
    for task in started:
        task.cancel()


async def test_two_runs_are_served_by_one_fleet(tmp_path, workers):
    async with hosting(tmp_path) as (address, client, _):
        await client.submit("a", {**QUICK, "rounds": "2"})
        workers(address, "pi-1", "pi-2")
        await client.submit("b", {**QUICK, "rounds": "3"})
        runs = await until(client, lambda runs: all(run.phase == pb.RUN_PHASE_FINISHED for run in runs.values()))
        assert [(run.name, run.model_version) for run in runs.values()] == [("a", 3), ("b", 4)]
        for name in ("a", "b"):
            folder = tmp_path / "aggregator" / "runs" / name
            assert (folder / "run.toml").exists()
            assert sorted(path.name for path in (folder / "models").glob("*.safetensors"))


async def test_runs_go_on_in_the_next_process(tmp_path, workers):
    async with hosting(tmp_path, drained=False) as (_, client, _):
        await client.submit("a", {**QUICK, "rounds": "2"})
        await client.submit("b", {**QUICK, "rounds": "2", "priority": "3"})
    async with hosting(tmp_path) as (address, client, _):
        runs = {run.name: run for run in await client.runs()}
        assert {name: run.priority for name, run in runs.items()} == {"a": 0, "b": 3}
        workers(address, "pi-1", "pi-2")
        await until(client, lambda runs: all(run.phase == pb.RUN_PHASE_FINISHED for run in runs.values()))


async def test_only_devices_that_a_run_asks_for_serve_it(tmp_path, workers):
    async with hosting(tmp_path) as (address, client, _):
        await client.submit("north", {**QUICK, "rounds": "1", "requires": 'label.site == "north"'})
        workers(address, "pi-1", "pi-2", device={"labels": {"site": "north"}})
        workers(address, "pi-3", device={"labels": {"site": "south"}})
        await until(client, lambda runs: runs["north"].phase == pb.RUN_PHASE_FINISHED)
        records = {record.worker: record for record in await client.of("north").workers()}
        rounds = await client.of("north").all_rounds()
        assert {task.worker for record in rounds for task in record.tasks} == {"pi-1", "pi-2"}
        assert "north" in records["pi-3"].refusals
        assert list(records["pi-1"].eligible_for) == ["north"]


async def test_settings_change_from_the_next_round_on(tmp_path, workers):
    async with hosting(tmp_path) as (address, client, _):
        await client.submit("a", {**QUICK, "rounds": "1"})
        changed = await client.of("a").change({"rounds": "3", "deadline": "5m"})
        assert changed == {"rounds": "1 -> 3", "policy.deadline_s": "600.0 -> 300.0"}
        workers(address, "pi-1", "pi-2")
        runs = await until(client, lambda runs: runs["a"].phase == pb.RUN_PHASE_FINISHED)
        assert (runs["a"].model_version, (await client.of("a").run()).policy.deadline.seconds) == (4, 300)
        with pytest.raises(IllegalTransition):
            await client.of("a").change({"rounds": "9"})


async def test_what_may_not_change_is_refused_by_name(tmp_path):
    async with hosting(tmp_path) as (_, client, _):
        await client.submit("a", QUICK)
        for settings, word in (
            ({"seed": "7"}, "seed"),
            ({"port_file": "/tmp/x"}, "port_file"),
            ({"roundz": "7"}, "roundz"),
            ({"requires": "memroy > 1"}, "column 1"),
        ):
            with pytest.raises(UsageError, match=word):
                await client.of("a").change(settings)
        with pytest.raises(UsageError, match="already"):
            await client.submit("a", QUICK)
        for name in ("", "../b", "a/b", ".hidden"):
            with pytest.raises(UsageError, match="name"):
                await client.submit(name, QUICK)


async def test_a_run_is_cloned_with_its_model_and_removed(tmp_path, workers):
    async with hosting(tmp_path) as (address, client, _):
        await client.submit("a", {**QUICK, "rounds": "1"})
        workers(address, "pi-1", "pi-2")
        await until(client, lambda runs: runs["a"].phase == pb.RUN_PHASE_FINISHED)
        await client.of("a").clone("b", {"rounds": "2"}, version=2)
        await until(client, lambda runs: runs["b"].phase == pb.RUN_PHASE_FINISHED)
        await client.of("a").remove()
        assert [run.name for run in await client.runs()] == ["b"]
        assert not (tmp_path / "aggregator" / "runs" / "a").exists()
        with pytest.raises(NotFound):
            await client.of("a").run()
