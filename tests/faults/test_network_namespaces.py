"""A worker in a network namespace of its own, whose cable to the aggregator is pulled and put back.

What a proxy cannot do: nobody is told of the break. No reset comes, packets just go nowhere, and both sides have
to find out by themselves. `make faults` takes the cable away for a second, then for longer than any keepalive
waits, which is a minute; `FEDGRPC_DOWN_S=180` makes that three.
"""

import asyncio
import os
import shutil
import subprocess
import time
from contextlib import asynccontextmanager, contextmanager

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedgrpc.v1 import round_pb2
from tests.faults.tasks import ZEROS
from tests.support.processes import running_process
from tests.support.running_federation import running_aggregator

DOWN_S = [1.0, float(os.environ.get("FEDGRPC_DOWN_S", "75"))]


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Cable:
    """Two ends of a virtual cable: one here, one in a namespace."""

    def __init__(self, number):
        self.namespace = f"fedgrpc-{number}"
        self.near, self.far = f"fgn{number}", f"fgf{number}"
        block = 4 * (number % 64)
        self.near_address, self.far_address = f"10.213.7.{block + 1}", f"10.213.7.{block + 2}"

    def lay(self):
        ip("netns", "add", self.namespace)
        ip("link", "add", self.near, "type", "veth", "peer", "name", self.far, "netns", self.namespace)
        ip("address", "add", f"{self.near_address}/30", "dev", self.near)
        ip("-n", self.namespace, "address", "add", f"{self.far_address}/30", "dev", self.far)
        ip("-n", self.namespace, "link", "set", "lo", "up")
        ip("-n", self.namespace, "link", "set", self.far, "up")
        self.put_back()

    def pull(self):
        ip("link", "set", self.near, "down")

    def put_back(self):
        ip("link", "set", self.near, "up")

    def remove(self):
        subprocess.run(["ip", "netns", "del", self.namespace], capture_output=True)


@pytest.fixture
def cable():
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the command ip")
    laid = Cable(os.getpid() % 10_000)
    try:
        laid.lay()
    except subprocess.CalledProcessError as error:
        laid.remove()
        pytest.skip(f"network namespaces cannot be used here: {error.stderr.decode().strip()}")
    yield laid
    laid.remove()


@asynccontextmanager
async def worker_behind(cable, folder, port):
    place = ["--aggregator", f"{cable.near_address}:{port}", "--serve-address", "none", "--name", "far"]
    task = ["--task", "tests.faults.tasks:Adding", "--option", "seconds=0.3", "--state-dir", folder / "far"]
    again = ["--reconnect-first", "100ms", "--reconnect-cap", "1s", "--stall", "10m"]
    before = ("ip", "netns", "exec", cable.namespace)
    async with running_process("worker", *place, *task, *again, before=before) as started:
        yield started


@contextmanager
def pulled(cable):
    cable.pull()
    try:
        yield
    finally:
        cable.put_back()


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize("down_s", DOWN_S)
async def test_a_cable_that_is_pulled_within_a_round_costs_only_time(tmp_path, cable, down_s, recovery_of):
    save_file(ZEROS, tmp_path / "initial.safetensors")
    policy = {"min_workers": 1, "deadline_s": 900.0, "lease_s": 600.0}
    how = {
        "rounds": 8,
        "policy": policy,
        "address": "0.0.0.0:0",
        "insecure": True,
        "upload_recipe": "raw",
        "download_recipe": "raw",
    }
    async with running_aggregator(tmp_path, **how) as running:
        port = running.address.rpartition(":")[2]
        async with worker_behind(cable, tmp_path, port) as worker:
            await worker.until("task started", round=2)
            with pulled(cable):
                await asyncio.sleep(down_s)
            begun = time.monotonic()
            version = (await running.run()).model_version
            await running.until(lambda run, _: run.model_version > version, timeout_s=300)
            recovery_of(f"cable pulled for {down_s:g} s", time.monotonic() - begun)
            run = await running.until_finished()
            assert await worker.ended() == 0
        assert run.model_version == 9
        np.testing.assert_array_equal(running.weights(9)["w"], ZEROS["w"] + 8)
        for item in await running.rounds():
            (task,) = item.tasks
            assert task.phase == round_pb2.TASK_PHASE_ACCEPTED
