"""An aggregator in this process that hosts any number of runs, and the settings of a quick one."""

import asyncio
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from fedgrpc.aggregator.server import Aggregator, Hosting
from fedgrpc.calls import connect
from fedgrpc.cli.aggregator import COMMAND, run_settings, run_texts
from fedgrpc.rpc.address import local_address
from tests.support.hand_driven_device import PATIENCE_S
from tests.support.running_federation import settings_for

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
async def hosting(folder, drained=True, has_own=False, **changes):
    """An aggregator, without a run of its own unless `has_own`, and a client of it.

    Unless `drained` it ends as a kill ends it.
    """
    given = {**process_values(), "durable": False, "drain_s": 1.0}
    host = Hosting(has_own, partial(run_settings, given), run_texts)
    async with serving(replace(settings_for(folder), initial_model=None, **changes), host, drained) as served:
        yield served


@asynccontextmanager
async def serving(settings, host, drained=True):
    """An aggregator with these settings, and a client of it."""
    ready = asyncio.get_running_loop().create_future()
    aggregator = Aggregator(settings, hosting=host)
    task = asyncio.create_task(aggregator.run(ready.set_result))
    await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
    address = f"127.0.0.1:{ready.result()}"
    try:
        with local_address(settings.data_dir / "identity") as local:
            async with connect(local) as client:
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
