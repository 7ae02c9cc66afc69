"""Trees of real aggregators for the tests: each below another, on a free port, in this process."""

import asyncio
from contextlib import asynccontextmanager

from fedgrpc.hierarchy.process import Leaf
from fedgrpc.protocol.tasks import WorkerRole
from fedgrpc.rpc.channel import open_channel
from fedgrpc.rpc.retry import Backoff
from fedgrpc.v1 import aggregator_pb2_grpc
from fedgrpc.worker.settings import WorkerSettings
from tests.support.hand_driven_device import PATIENCE_S
from tests.support.processes import running_process
from tests.support.running_federation import RunningAggregator, channel_to, settings_for, shift_clock


class RunningLeaf(RunningAggregator):
    """An aggregator below another, and a way to look at it."""

    def pass_time(self, seconds):
        shift_clock(self.aggregator._runs.present.aggregator, seconds)

    def stop(self):
        if not self.aggregator._stopping:
            self.aggregator.stop()


@asynccontextmanager
async def running_leaf(folder, name, above, join=None, **changes):
    """An aggregator below the one at `above`, from when its workers are served until the block ends."""
    folder.mkdir(exist_ok=True)
    defaults = {"initial_model": None, "rounds": 10, "evaluate": True, "stay": False}
    settings = settings_for(folder, **{**defaults, **changes})
    link = WorkerSettings(
        name=name,
        aggregator=above if isinstance(above, str) else above.address,
        state_dir=settings.data_dir / "upstream",
        role=WorkerRole.AGGREGATOR,
        join=join,
        serve_address=None,
        poll_wait_s=5.0,
        backoff=Backoff(0.05, 0.5),
    )
    ready = asyncio.get_running_loop().create_future()
    leaf = Leaf(settings, link)
    task = asyncio.create_task(leaf.run(lambda port: ready.done() or ready.set_result(port)))
    await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
    address = f"127.0.0.1:{ready.result()}"
    async with channel_to(settings, address) as channel:
        running = RunningLeaf(address, settings, leaf, task, aggregator_pb2_grpc.AggregatorStub(channel))
        try:
            yield running
        finally:
            if not task.done():
                running.stop()
            await asyncio.wait_for(task, PATIENCE_S)


@asynccontextmanager
async def leaf_process(folder, name, above, *arguments, address="127.0.0.1:0", **how):
    """(process, a way to look at it) of `fedgrpc aggregator --upstream`, which can be killed."""
    place = ["--data-dir", folder / name, "--address", address, "--upstream", above, "--upstream-name", name]
    round_ = ["--min-workers", 2, "--selection-window", "30s", "--lease", "5m", "--encoding", "raw"]
    async with running_process("aggregator", *place, *round_, *arguments, **how) as started:
        address = f"127.0.0.1:{(await started.until('serving'))['port']}"
        async with open_channel(address) as channel:
            yield (
                started,
                RunningAggregator(address, None, None, None, aggregator_pb2_grpc.AggregatorStub(channel)),
            )
