"""What the tests of a whole federation share: a real aggregator, real workers, and devices played by hand.

A `Device` is a worker without a program: the test makes each of its calls, the wrong ones too.
"""

import asyncio
import io
import zlib
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc
import grpc.aio
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedgrpc.aggregator.server import Aggregator
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.codec.encoding import ENCODING_NAMES
from fedgrpc.codec.payload import PayloadReader, buffer_reader, tensors_of, write_payload
from fedgrpc.codec.recipe import Recipe
from fedgrpc.protocol.durations import duration_to_proto
from fedgrpc.protocol.tensors import manifest_from_proto, manifest_to_proto
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.rpc.channel import open_channel
from fedgrpc.rpc.client_stream import ClientStream
from fedgrpc.rpc.retry import Backoff
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import aggregator_pb2_grpc, device_pb2, round_pb2, tensor_pb2
from fedgrpc.worker.process import run_worker
from fedgrpc.worker.settings import WorkerSettings
from fedgrpc.worker.trainer import EvalResult, TrainResult
from fedgrpc.worker.training import ALL_PARTS

MODEL = {
    "w": np.linspace(-1, 1, 2000, dtype=np.float32).reshape(50, 40),
    "b": np.zeros(40, np.float32),
    "n": np.array(3, np.int64),
}
CHUNK_BYTES = 2048
PATIENCE_S = 120.0


def update_of(change=1.0, n=4):
    """An honest update of `MODEL`: differences for floats, values for the rest."""
    return {"w": np.full((50, 40), change, np.float32), "b": np.full(40, change, np.float32), "n": np.array(n)}


def encoded(tensors, recipe="raw"):
    """(manifest, payload) as they travel."""
    out = io.BytesIO()
    manifest = write_payload(tensors, Recipe.parse(recipe), out, np.random.default_rng(0))
    return manifest_to_proto(manifest), out.getvalue()


def chunk(data, offset):
    return pb.PushUpdateRequest(chunk={"offset": offset, "data": data, "crc32": zlib.crc32(data)})


def chunks(payload, offset=0, chunk_bytes=CHUNK_BYTES):
    starts = range(offset, len(payload), chunk_bytes)
    return [chunk(payload[start : start + chunk_bytes], start) for start in starts]


class Device:
    """One worker of the fleet, by hand."""

    def __init__(self, stub, name):
        self.stub = stub
        self.name = name

    async def register(self, role=device_pb2.WORKER_ROLE_TRAINER, **about):
        both = [tensor_pb2.COMPRESSION_NONE, tensor_pb2.COMPRESSION_ZSTD]
        about = {
            "encodings": ENCODING_NAMES,
            "compressions": both,
            "local_model_parts": sorted(ALL_PARTS),
            **about,
        }
        return await self.stub.Register(pb.RegisterRequest(worker=self.name, role=role, **about))

    async def poll(self, wait_s=10.0, held=(0, b"")):
        request = pb.PollTaskRequest(worker=self.name, wait=duration_to_proto(wait_s))
        request.held_version, request.held_sha256 = held
        return await self.stub.PollTask(request)

    async def task(self, wait_s=PATIENCE_S, held=(0, b"")):
        """The next task, over as many polls as it takes: the aggregator ends each of them after a while."""
        async with asyncio.timeout(wait_s):
            while not (reply := await self.poll(held=held)).HasField("task"):
                assert not reply.run_ended, f"no task came for {self.name}: the run has ended"
        return reply.task

    def header(self, task, manifest, **changes):
        values = {"worker": self.name, "token": task.token, "manifest": manifest, "example_count": 10, "steps": 1}
        return pb.UpdateHeader(**{**values, **changes})

    async def send(self, *messages):
        """One PushUpdate with exactly these messages; raises what the aggregator answers."""
        stream = ClientStream(self.stub.PushUpdate(timeout=PATIENCE_S))
        for message in messages:
            if not await stream.write(message):
                break
        return await stream.finish()

    async def push(self, task, tensors=None, recipe="raw", offset=0, **changes):
        """An honest update, or one with `changes` in its header."""
        manifest, payload = encoded(update_of() if tensors is None else tensors, recipe)
        header = pb.PushUpdateRequest(header=self.header(task, manifest, **changes))
        return await self.send(header, *chunks(payload, offset))

    async def held(self, task, worker=None):
        return await self.stub.QueryPush(pb.QueryPushRequest(worker=worker or self.name, token=task.token))

    async def until_held(self, task, size_bytes):
        """Wait until so much of the update of `task` is in the aggregator's file.

        Not for phase UPLOADING to be seen: that is told with the header, before there is a byte.
        """
        async with asyncio.timeout(PATIENCE_S):
            while (await self.held(task)).committed_size_bytes < size_bytes:  # noqa: ASYNC110 - nobody tells of a byte
                await asyncio.sleep(0.02)

    async def beat(self, task, phase=round_pb2.TASK_PHASE_TRAINING, progress=0.5, worker=None):
        request = pb.HeartbeatRequest(worker=worker or self.name, token=task.token, phase=phase, progress=progress)
        return await self.stub.Heartbeat(request)

    async def give_back(self, task, reason="out of luck", worker=None):
        request = pb.ReportFailureRequest(worker=worker or self.name, token=task.token, reason=reason)
        return await self.stub.ReportFailure(request)

    async def pull(self, version=0, recipe="raw", offset=0, sub_model="", base=(0, b"")):
        """(header, payload) of a model version, or of its difference to `base`: (version, sha256)."""
        request = pb.PullModelRequest(version=version, recipe=recipe, offset=offset, sub_model=sub_model)
        request.base_version, request.base_sha256 = base
        header, payload = None, bytearray()
        async for message in self.stub.PullModel(request):
            if message.WhichOneof("content") == "header":
                header = message.header
            else:
                assert message.chunk.offset == offset + len(payload)
                assert zlib.crc32(message.chunk.data) == message.chunk.crc32
                payload += message.chunk.data
        return header, bytes(payload)

    async def model(self, version=0, recipe="raw"):
        header, payload = await self.pull(version, recipe)
        return tensors_of(PayloadReader(manifest_from_proto(header.manifest), buffer_reader(payload)))


@dataclass
class Running:
    """A running aggregator and a way to look at it."""

    address: str
    settings: AggregatorSettings
    aggregator: Aggregator
    task: asyncio.Task
    stub: aggregator_pb2_grpc.AggregatorStub

    async def device(self, name, **about):
        device = Device(self.stub, name)
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
        coordinator = self.aggregator.coordinator
        before = coordinator.clock
        coordinator.clock = lambda: before() + seconds
        coordinator.wake.set()

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

    def weights(self, version):
        """A model version as it lies on the disk."""
        return load_file(self.settings.data_dir / "models" / f"{version:06d}.safetensors")


def settings_for(folder, policy=None, **changes):
    """Settings of a quick run of two workers from `MODEL`.

    No time runs out by itself here, nor does a round open without a worker that is only slow to poll: where a test
    wants that, it says so, or lets the time pass (`Running.pass_time`).
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
    }
    values = {"reconnect_grace_s": 0.5, **values}
    return AggregatorSettings(**{**defaults, **changes, "policy": RoundPolicy(**values)})


@asynccontextmanager
async def aggregating(folder, **changes):
    """A real aggregator on a free port until the block ends."""
    settings = settings_for(folder, **changes)
    ready = asyncio.get_running_loop().create_future()
    aggregator = Aggregator(settings)
    task = asyncio.create_task(aggregator.run(ready.set_result))
    await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
    address = f"127.0.0.1:{ready.result()}"
    async with open_channel(address) as channel:
        running = Running(address, settings, aggregator, task, aggregator_pb2_grpc.AggregatorStub(channel))
        try:
            yield running
        finally:
            running.stop()
            await asyncio.wait_for(task, PATIENCE_S)


class refused:  # noqa: N801 - reads as pytest.raises does
    """The block ends with this status, this reason, and the name of the domain error; keeps its `trailers`."""

    def __init__(self, code, reason, error=None):
        self._raises = pytest.raises(grpc.aio.AioRpcError)
        self._code, self._reason, self._error = code, reason, error

    def __enter__(self):
        self._caught = self._raises.__enter__()
        return self

    def __exit__(self, *exception):
        passed = self._raises.__exit__(*exception)
        error = self._caught.value
        self.trailers = dict(error.trailing_metadata())
        assert (error.code(), error.details()) == (getattr(grpc.StatusCode, self._code), error.details())
        assert self._reason in error.details()
        if self._error is not None:
            assert self.trailers["fedgrpc-error"] == self._error
        return passed


class Shifter:
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


def working(running, folder, name, trainer, **changes):
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
