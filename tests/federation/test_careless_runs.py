"""Runs under careless operators: changes that wait, names that are taken, settings that no message holds."""

import asyncio
import threading
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from fedgrpc.aggregator.server import Hosting
from fedgrpc.cli.aggregator import run_settings, run_texts
from fedgrpc.errors import LinkError, UsageError
from tests.support.hand_driven_device import PATIENCE_S
from tests.support.many_runs import QUICK, hosting, process_values, serving, until
from tests.support.running_federation import ShiftTrainer, settings_for, start_worker


class WaitingTrainer(ShiftTrainer):
    """Trains until `go` is set."""

    def __init__(self):
        super().__init__(weights={"w": np.zeros(4, np.float32)})
        self.go = threading.Event()

    def train(self, weights, job):
        assert self.go.wait(PATIENCE_S)
        return super().train(weights, job)


async def test_a_change_that_waits_for_a_round_holds_up_nothing_else(tmp_path):
    trainer = WaitingTrainer()
    async with hosting(tmp_path) as (address, client, _):
        await client.submit("a", {**QUICK, "rounds": "3"})
        workers = [start_worker(address, tmp_path, name, trainer, poll_wait_s=2.0) for name in ("pi-1", "pi-2")]
        await until(client, lambda runs: runs["a"].busy_workers == 2 and runs["a"].model_version == 1)
        change = asyncio.create_task(client.of("a").change({"deadline": "5m"}))
        await client.of("a").run()
        async with asyncio.timeout(PATIENCE_S / 2):
            await client.submit("b", {**QUICK, "requires": 'name == "nobody"'})
        assert not change.done()
        # Nor the end of the process, which is at the end of the block.
    trainer.go.set()
    with pytest.raises((LinkError, asyncio.CancelledError)):
        await change
    for worker in workers:
        worker.cancel()
    async with hosting(tmp_path) as (_, client, _):
        assert (await client.of("a").run()).policy.deadline.seconds == 600


async def test_a_submitted_run_does_not_take_the_place_of_the_aggregators_own(tmp_path):
    async with hosting(tmp_path) as (_, client, _):
        await client.submit("a", QUICK)
        submitted = (await client.of("a").run()).id
    settings = replace(settings_for(tmp_path), initial_model=None, run_name="a")
    host = Hosting(True, partial(run_settings, process_values()), run_texts)
    async with serving(settings, host) as (_, client, _):
        assert [(run.name, run.id != submitted) for run in await client.runs()] == [("a", True)]


@pytest.mark.parametrize("quota", ["4294967296", "9" * 30])
async def test_a_setting_that_no_message_holds_is_refused(tmp_path, quota):
    async with hosting(tmp_path) as (_, client, _):
        with pytest.raises(UsageError, match="quota"):
            await client.submit("a", {**QUICK, "quota": quota})
        assert not await client.runs()


async def test_texts_of_every_script_outlive_the_process(tmp_path):
    async with hosting(tmp_path) as (_, client, _):
        await client.submit("a", {**QUICK, "task": "\U0001f600\x7f"})
        assert await client.of("a").change({"priority": "7"})
    async with hosting(tmp_path) as (_, client, _):
        assert [(run.name, run.priority) for run in await client.runs()] == [("a", 7)]
