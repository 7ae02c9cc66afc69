"""Issue: "Disk full, a corrupt file, a read-only data folder: a clear error, an honest health status, nothing
half-written." Corrupt files are in tests/federation/test_data_folder.py; here are real file systems: small ones
that fill up, and one mounted to be read only.
"""

import asyncio
import os
import shutil
import subprocess
from contextlib import contextmanager

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedgrpc.v1 import round_pb2
from tests.faults.tasks import MODEL
from tests.federation.test_data_folder import Serving, health_becomes
from tests.support.hand_driven_device import refused
from tests.support.processes import running_process
from tests.support.running_federation import ShiftTrainer, running_aggregator, start_worker

MIB = 1 << 20


@contextmanager
def small_disk(folder, size_mib):
    """A file system of that size at `folder`; skips where this user may not mount one."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder, options):
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def fill(folder, leave_bytes=0):
    """Take all that is free but so much; remove the file to give it back."""
    filler = folder / "filler"
    space = os.statvfs(folder)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, space.f_bavail * space.f_frsize - leave_bytes))
    return filler


def large(folder):
    save_file(MODEL, folder / "large.safetensors")
    how = {"upload_recipe": "raw", "download_recipe": "raw", "durable": True}
    return {"initial_model": folder / "large.safetensors", **how}


def update():
    return {"w": np.ones_like(MODEL["w"]), "b": np.ones_like(MODEL["b"]), "n": np.array(4)}


async def test_a_full_disk_refuses_uploads_for_now_and_the_health_says_so(tmp_path):
    with small_disk(tmp_path / "small", 16) as disk:
        async with running_aggregator(tmp_path, data_dir=disk / "run", **large(tmp_path)) as running:
            a, b = await running.device("a"), await running.device("b")
            a_task, b_task = await asyncio.gather(a.task(), b.task())
            filler = fill(disk, MODEL["w"].nbytes // 2)
            with refused("INTERNAL", "cannot store an update: No space left on device", "StorageError"):
                await a.push(a_task, update())
            await health_becomes(running, Serving.NOT_SERVING)
            # Half an update is an upload on its way, and accepted by nobody.
            assert [name for name in running.kept_updates() if name.endswith(".update")] == []
            assert (await running.run()).model_version == 1
            filler.unlink()
            offset = (await a.held(a_task)).committed_size_bytes
            assert (await a.push(a_task, update(), offset=offset)).complete
            await health_becomes(running, Serving.SERVING)
            await b.push(b_task, update())
            await running.until_finished()
            np.testing.assert_allclose(running.weights(2)["w"], MODEL["w"] + 1, rtol=1e-6)


async def test_a_disk_that_fills_before_the_commit_keeps_every_accepted_update_until_there_is_room(tmp_path):
    with small_disk(tmp_path / "small", 16) as disk:
        async with running_aggregator(tmp_path, data_dir=disk / "run", **large(tmp_path)) as running:
            a, b = await running.device("a"), await running.device("b")
            a_task, b_task = await asyncio.gather(a.task(), b.task())
            await a.push(a_task, update())
            filler = fill(disk, MODEL["w"].nbytes + MIB // 2)
            assert (await b.push(b_task, update())).complete
            await health_becomes(running, Serving.NOT_SERVING)
            assert (await running.run()).model_version == 1
            assert {task.phase for task in (await running.round()).tasks} == {round_pb2.TASK_PHASE_ACCEPTED}
            filler.unlink()
            await health_becomes(running, Serving.SERVING)
            await running.until_finished()
            np.testing.assert_allclose(running.weights(2)["w"], MODEL["w"] + 1, rtol=1e-6)


async def test_an_aggregator_that_cannot_write_its_folder_says_so_in_one_line(tmp_path):
    model = tmp_path / "model.safetensors"
    save_file(MODEL, model)
    with small_disk(tmp_path / "small", 4) as disk:
        remount(disk, "ro")
        place = ["--data-dir", disk / "run", "--address", "127.0.0.1:0", "--initial-model", model]
        async with running_process("aggregator", *place) as it:
            assert await it.ended() == 2
            (line,) = it.events
            assert line["event"] == f"error: cannot use the data folder {disk / 'run'}: Read-only file system"


async def test_a_folder_that_becomes_read_only_stops_the_round_and_not_the_aggregator(tmp_path):
    with small_disk(tmp_path / "small", 16) as disk:
        (disk / "run" / "uploads").mkdir(parents=True)
        uploads = disk / "run" / "uploads"
        async with running_aggregator(tmp_path, data_dir=disk / "run", **large(tmp_path)) as running:
            a, b = await running.device("a"), await running.device("b")
            a_task, b_task = await asyncio.gather(a.task(), b.task())
            with read_only(uploads):
                with refused("INTERNAL", "cannot store an update: Read-only file system", "StorageError"):
                    await a.push(a_task, update())
                await health_becomes(running, Serving.NOT_SERVING)
                assert (await a.model())["n"] == MODEL["n"]
            await asyncio.gather(a.push(a_task, update()), b.push(b_task, update()))
            await health_becomes(running, Serving.SERVING)
            await running.until_finished()


@contextmanager
def read_only(folder):
    """The folder mounted over itself, to be read only."""
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    remount(folder, "bind,ro")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


async def test_a_worker_whose_disk_is_full_gives_its_task_back_with_the_reason_and_goes_on_later(tmp_path):
    with small_disk(tmp_path / "small", 8) as disk:
        changes = large(tmp_path)
        async with running_aggregator(tmp_path, policy={"min_workers": 1}, **changes) as running:
            trainer = Filling(disk)
            worker = start_worker(running, disk, "pi", trainer)
            await asyncio.wait_for(trainer.filled.wait(), 120)
            first = await running.until_ended(1)
            assert "No space left on device" in first.tasks[0].reason
            assert list((disk / "pi" / "spool").glob("*0*")) == []
            trainer.filler.unlink()
            assert (await running.until_finished()).model_version == 2
            assert await asyncio.wait_for(worker, 120) == 0
            np.testing.assert_allclose(running.weights(2)["w"], MODEL["w"] + 1, rtol=1e-6)


class Filling(ShiftTrainer):
    """Fills the worker's disk in its first training."""

    def __init__(self, disk):
        super().__init__(weights=MODEL)
        self._disk = disk
        self._loop = asyncio.get_running_loop()
        self.filler = None
        self.filled = asyncio.Event()

    def train(self, weights, job):
        if self.filler is None:
            self.filler = fill(self._disk, MIB // 4)
            self._loop.call_soon_threadsafe(self.filled.set)
        return super().train(weights, job)
