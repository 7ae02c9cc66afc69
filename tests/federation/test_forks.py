"""A learning task may fork: its children get none of the worker's signals, locks and connections."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys

import pytest

from tests.support.hand_driven_device import PATIENCE_S
from tests.support.processes import aggregator_process, free_address, worker_process

# Serves, connects to itself and forks; the child counts its threads once others have had time to begin.
_FORKING_SERVER = """
import fedgrpc
import asyncio, os, time
import grpc.aio

async def main():
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        await channel.channel_ready()
        child = os.fork()
        if not child:
            time.sleep(0.3)
            os._exit(len(os.listdir("/proc/self/task")))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    await server.stop(None)

asyncio.run(main())
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs Linux's /proc")
def test_grpc_starts_no_threads_in_a_forked_child():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GRPC_")}
    command = [sys.executable, "-c", _FORKING_SERVER]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert ended.stdout == "1\n", ended.stderr


@pytest.mark.faults
async def test_a_pool_of_forked_processes_in_each_training_does_not_end_the_worker(tmp_path):
    async with (
        aggregator_process(tmp_path, "--min-workers", 1, "--rounds", 3) as (_, running),
        worker_process(running, tmp_path, "pi", tmp_path / "data", task="Pooled") as worker,
    ):
        await worker.until("update acknowledged", round=3)
        assert not any(line["event"] == "draining" for line in worker.events)


def sockets_of(pid):
    """Where the IP sockets lead that a process has open: inode numbers of /proc."""
    found = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/{pid}/fd/{name}")
            if target.startswith("socket:["):
                found.add(target.removeprefix("socket:[").removesuffix("]"))
    with open(f"/proc/{pid}/net/tcp") as tcp, open(f"/proc/{pid}/net/tcp6") as tcp6:
        inodes = {line.split()[9] for line in [*tcp, *tcp6][1:] if len(line.split()) > 9}
    return found & inodes


async def child_of(path):
    """The process of which the task tells in that file."""
    async with asyncio.timeout(PATIENCE_S):
        while not (path.exists() and path.read_text()):  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.05)
    return int(path.read_text())


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux's /proc")
@pytest.mark.faults
async def test_a_child_that_outlives_a_killed_worker_holds_neither_its_folder_nor_its_port(tmp_path):
    data = tmp_path / "data"
    serve = ("--serve-address", free_address())
    async with (
        aggregator_process(tmp_path, "--min-workers", 1, "--rounds", 1) as (_, running),
        worker_process(running, tmp_path, "pi", data, *serve, task="Orphaning") as first,
    ):
        (data / "wait").touch()
        child = await child_of(data / "child")
        try:
            assert sockets_of(first.pid)
            assert not sockets_of(child)
            first.send(signal.SIGKILL)
            await first.ended()
            (data / "wait").unlink()
            async with worker_process(running, tmp_path, "pi", data, *serve) as second:
                await second.until("update acknowledged", round=1)
            os.kill(child, 0)
        finally:
            os.kill(child, signal.SIGKILL)
