"""A real aggregator and real workers in this process, and the settings of a quick run."""

import asyncio
import os
from contextlib import asynccontextmanager
from dataclasses import dataclass

from safetensors.numpy import load_file, save_file

from fedgrpc.aggregator.server import Aggregator
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.rpc.address import local_address
from fedgrpc.rpc.channel import open_channel
from fedgrpc.rpc.retry import Backoff
from fedgrpc.trainer import EvalResult, TrainResult
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import aggregator_pb2_grpc, round_pb2
from fedgrpc.worker.process import run_worker
from fedgrpc.worker.settings import WorkerSettings
from tests.support.hand_driven_device import MODEL, PATIENCE_S, HandDrivenDevice

# Ingest processes of every aggregator that says no other number: the same tests hold with and without.
INGEST = int(os.environ.get("FEDGRPC_TESTS_INGEST", "0"))


def shift_clock(aggregator, seconds):
    """Let the aggregator's clock jump ahead."""
    before = aggregator.clock
    aggregator.clock = lambda: before() + seconds
    aggregator.coordinator.wake.set()


@dataclass
class RunningAggregator:
    """A running aggregator and a way to look at it."""

    address: str
    settings: AggregatorSettings
    aggregator: Aggregator
    task: asyncio.Task
    stub: aggregator_pb2_grpc.AggregatorStub

    async def device(self, name, **about):
        device = HandDrivenDevice(self.stub, name)
        await device.register(**about)
        return device

    async def run(self):
        return (await self.stub.GetRun(pb.GetRunRequest())).run

    async def round(self, number=None):
        return (await self.stub.GetRound(pb.GetRoundRequest(number=number))).round

    async def rounds(self):
        """All finished rounds, oldest first."""
        return list((await self.stub.ListRounds(pb.ListRoundsRequest())).rounds)[::-1]

    async def until(self, condition, timeout_s=PATIENCE_S):
        """Wait for `condition(run, round)`; returns both as they then were."""
        async with asyncio.timeout(timeout_s):
            async for message in self.stub.WatchRounds(pb.WatchRoundsRequest(max_rate_hz=20)):
                if condition(message.run, message.round):
                    return message.run, message.round
        raise AssertionError("the run ended before the condition was met")

    async def until_task(self, worker, phase):
        """Wait until the task of `worker` in the current round is in `phase`; returns its record."""

        def there(run, round_):
            return any(task.worker == worker and task.phase == phase for task in round_.tasks)

        _, round_ = await self.until(there)
        return next(task for task in round_.tasks if task.worker == worker)

    async def until_ended(self, number):
        """Wait until round `number` has ended; returns its record.

        Not for its phase to be seen: a watcher is told the latest state, and the next round may have opened.
        """
        ended = {round_pb2.ROUND_PHASE_COMMITTED, round_pb2.ROUND_PHASE_ABANDONED}
        await self.until(lambda _, it: it.number > number or (it.number == number and it.phase in ended))
        return await self.round(number)

    async def until_known(self, worker):
        """Wait until `worker` has registered."""
        async with asyncio.timeout(PATIENCE_S):
            while worker not in {known.name for known in self.aggregator.coordinator.fleet}:
                await self.run()

    async def until_polling(self, worker):
        """Wait until `worker` asks for a task: it then is alive, however the clock jumps."""
        fleet = self.aggregator.coordinator.fleet
        async with asyncio.timeout(PATIENCE_S):
            while not fleet.get(worker).polls:
                await self.run()

    def pass_time(self, seconds):
        """The aggregator's clock jumps ahead: what would end by then ends now, and not before.

        For deadlines and leases that are to run out: real ones, short enough to be waited for, would also run out
        on a machine that stands still for as long.
        """
        shift_clock(self.aggregator, seconds)

    async def until_finished(self):
        run, _ = await self.until(lambda run, _: run.phase == pb.RUN_PHASE_FINISHED)
        return run

    def stop(self):
        """Drain, once: a second call would end this process."""
        if not self.aggregator._stopping.is_set():
            self.aggregator.stop()

    def kept_updates(self):
        """Names of the updates on the disk, accepted or on their way; not of files to be used again."""
        return [path.name for path in (self.settings.data_dir / "uploads").iterdir() if path.is_file()]

    def running_uploads(self):
        """Tokens of the tasks whose updates are on their way; their files open with their first bytes."""
        return set(self.aggregator.runs.own.service._receiver._slots._streams)

    def weights(self, version):
        """A model version as it lies on the disk."""
        return load_file(self.settings.data_dir / "models" / f"{version:06d}.safetensors")


def settings_for(folder, policy=None, **changes):
    """Settings of a quick run of two workers from `MODEL`.

    No time runs out by itself here, nor does a round open without a worker that is only slow to poll: where a test
    wants that, it says so, or lets the time pass (`RunningAggregator.pass_time`).
    """
    model = folder / "initial.safetensors"
    if not model.exists():
        save_file(MODEL, model)
    values = {
        **{"min_workers": 2, "deadline_s": 600.0, "lease_s": 300.0, "selection_window_s": 30.0},
        **(policy or {}),
    }
    defaults = {
        "data_dir": folder / "aggregator",
        "address": "127.0.0.1:0",
        "rounds": 1,
        "initial_model": model,
        "evaluate": False,
        "stay": True,
        "drain_s": 2.0,
        "durable": False,
        "download_recipe": "raw",
        "upload_recipe": "raw",
        "ingest": INGEST,
    }
    values = {"reconnect_grace_s": 0.5, **values}
    return AggregatorSettings(**{**defaults, **changes, "policy": RoundPolicy(**values)})


@asynccontextmanager
async def running_aggregator(folder, **changes):
    """A real aggregator on a free port until the block ends."""
    settings = settings_for(folder, **changes)
    ready = asyncio.get_running_loop().create_future()
    aggregator = Aggregator(settings)
    task = asyncio.create_task(aggregator.run(ready.set_result))
    await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
    address = f"127.0.0.1:{ready.result()}"
    # The tests look through the socket for operators: it needs no certificate.
    async with channel_to(settings, address) as channel:
        running = RunningAggregator(
            address, settings, aggregator, task, aggregator_pb2_grpc.AggregatorStub(channel)
        )
        try:
            yield running
        finally:
            running.stop()
            await asyncio.wait_for(task, PATIENCE_S)


@asynccontextmanager
async def channel_to(settings, address):
    with local_address(settings.data_dir / "identity") as local:
        plain = settings.tls is None and not settings.has_authority
        async with open_channel(address if plain else local) as channel:
            yield channel


class ShiftTrainer:
    """A trainer that adds `change` to every float: what a round makes of it is plain arithmetic."""

    def __init__(self, change=1.0, examples=10, weights=None):
        self.change = change
        self.examples = examples
        self.weights = MODEL if weights is None else weights
        self.jobs = []
        self.scored = []

    def initial_weights(self):
        return self.weights

    def train(self, weights, job):
        self.jobs.append(job)
        # Its steps are no gradients, so there is nothing to add the term to.
        job.term()
        for _ in job.batches(self.examples, self.examples):
            pass
        moved = {name: a + self.change if a.dtype.kind == "f" else a + 1 for name, a in weights.items()}
        return TrainResult(
            {name: a.astype(weights[name].dtype) for name, a in moved.items()},
            self.examples,
            1,
            {"train_loss": self.change},
        )

    def evaluate(self, weights):
        mean = float(weights["w"].mean())
        self.scored.append(mean)
        return EvalResult(self.examples, {"mean": mean})


def start_worker(running, folder, name, trainer, **changes):
    """A real worker as a task; its result is the exit code."""
    settings = WorkerSettings(
        name=name,
        aggregator=running if isinstance(running, str) else running.address,
        state_dir=folder / name,
        serve_address=None,
        backoff=Backoff(0.05, 0.5),
        **{"poll_wait_s": 5.0, **changes},
    )
    return asyncio.create_task(run_worker(settings, trainer))
