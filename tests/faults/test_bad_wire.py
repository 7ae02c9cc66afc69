"""Workers behind a wire that loses one packet in twenty, repeats as many and lets them overtake each other.

What no proxy can do: TCP itself has to make good what the wire does, and takes its time. So calls are slow and
uneven, as over bad radio; every round still ends with every update in it, once.
"""

import asyncio
import os
import shutil
import subprocess

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedgrpc.v1 import round_pb2
from tests.faults.wire import Wire
from tests.support.hand_driven_device import PATIENCE_S
from tests.support.processes import running_process
from tests.support.running_federation import running_aggregator

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

WORKERS = 2
ROUNDS = 4
# A transfer is some 140 packets.
MODEL = {"w": np.zeros((50, 1000), np.float32), "n": np.array(0, np.int64)}
BAD = {"loss": 0.05, "twice": 0.05, "delay_s": 0.02, "jitter_s": 0.02, "seed": 7}


@pytest.fixture
async def lay():
    """Lays a wire as bad as asked."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("a wire needs root and the command ip")
    wires = []

    def laid(**how):
        wire = Wire(os.getpid() % 10_000 + len(wires), **how)
        try:
            wires.append(wire.__enter__())
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no wire can be laid here: {error}")
        return wire

    yield laid
    for wire in wires:
        wire.__exit__(None, None, None)


async def received(wire, sent):
    """What of these datagrams comes out at this machine's end of the wire."""
    loop = asyncio.get_running_loop()
    got = []

    class Received(asyncio.DatagramProtocol):
        def datagram_received(self, data, _):
            got.append(int(data))

    transport, _ = await loop.create_datagram_endpoint(Received, local_addr=(wire.address, 0))
    port = transport.get_extra_info("sockname")[1]
    program = "import socket, sys; s = socket.socket(type=socket.SOCK_DGRAM)\n"
    program += f"for i in range({sent}): s.sendto(b'%d' % i, ({wire.address!r}, {port}))"
    command = ("ip", "netns", "exec", wire.namespace, shutil.which("python3"), "-c", program)
    sender = await asyncio.create_subprocess_exec(*command)
    assert await asyncio.wait_for(sender.wait(), PATIENCE_S) == 0
    carried = -1
    async with asyncio.timeout(PATIENCE_S):
        while wire.under_way or carried != wire.done["carried"]:
            carried = wire.done["carried"]
            await asyncio.sleep(0.2)
    transport.close()
    return got


async def test_the_wire_loses_repeats_and_reorders_what_it_is_told_to(lay):
    got = await received(lay(loss=0.2, twice=0.2, delay_s=0.01, jitter_s=0.02), 100)
    assert 0.05 < 1 - len(set(got)) / 100 < 0.4
    assert len(got) > len(set(got)) * 1.05
    assert got != sorted(got)


async def test_a_good_wire_carries_everything_in_order(lay):
    assert await received(lay(), 50) == list(range(50))


async def test_a_wire_that_loses_repeats_and_reorders_costs_only_time(tmp_path, lay):
    save_file(MODEL, tmp_path / "initial.safetensors")
    policy = {"min_workers": WORKERS, "quorum": WORKERS, "deadline_s": 900.0, "lease_s": 600.0}
    how = {"rounds": ROUNDS, "policy": policy, "address": "0.0.0.0:0", "insecure": True}
    async with running_aggregator(tmp_path, upload_recipe="raw", download_recipe="raw", **how) as running:
        port = running.address.rpartition(":")[2]
        wires = [lay(**BAD) for _ in range(WORKERS)]
        async with asyncio.TaskGroup() as group:
            ends = [group.create_task(worked(wire, tmp_path / f"w{i}", port)) for i, wire in enumerate(wires)]
            await running.until_finished()
        assert [end.result() for end in ends] == [0] * WORKERS
        np.testing.assert_array_equal(running.weights(ROUNDS + 1)["w"], MODEL["w"] + ROUNDS)
        for record in await running.rounds():
            assert {task.phase for task in record.tasks} == {round_pb2.TASK_PHASE_ACCEPTED}
    for wire in wires:
        assert min(wire.done[what] for what in ("lost", "twice", "overtaken")) > 0


async def worked(wire, folder, port):
    """A worker's life behind the wire; its exit code."""
    place = ["--aggregator", f"{wire.address}:{port}", "--serve-address", "none", "--name", folder.name]
    task = ["--task", "tests.faults.tasks:Adding", "--option", "seconds=0.1", "--state-dir", folder]
    again = ["--reconnect-first", "100ms", "--reconnect-cap", "1s", "--stall", "10m"]
    before = ("ip", "netns", "exec", wire.namespace)
    async with running_process("worker", *place, *task, *again, before=before) as started:
        return await started.ended()
