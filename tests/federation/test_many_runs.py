"""One aggregator with many runs: submitted, served by one fleet, changed, and taken up by the next process."""

import numpy as np
import pytest

from fedgrpc.errors import IllegalTransition, NotFound, UsageError
from fedgrpc.v1 import aggregator_pb2 as pb
from tests.support.many_runs import QUICK, hosting, until
from tests.support.running_federation import ShiftTrainer, start_worker


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


async def test_settings_of_the_aggregator_s_own_run_change_with_its_flags_alone(tmp_path):
    async with hosting(tmp_path, has_own=True) as (_, client, _):
        for call in (client.change({"rounds": "9"}), client.clone("b", {})):
            with pytest.raises(UsageError, match="flags of the aggregator's start"):
                await call
        assert [run.name for run in await client.runs()] == ["default"]
