"""Issue: "Disk full, a corrupt file, a read-only data folder: a clear error, an honest health status, nothing
half-written." """

import asyncio
import json
import shutil
import struct

import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from safetensors.numpy import save_file
from structlog.testing import capture_logs

from fedgrpc.aggregator.server import Aggregator
from fedgrpc.errors import StorageError, UsageError
from fedgrpc.rpc.channel import open_channel
from fedgrpc.v1 import round_pb2
from tests.support.command_line import fedgrpc
from tests.support.hand_driven_device import MODEL, PATIENCE_S, HandDrivenDevice, refused, update_of
from tests.support.running_federation import running_aggregator, settings_for

Serving = health_pb2.HealthCheckResponse


async def fails_to_start(folder, error, text, **changes):
    """The aggregator ends with one line that says what is wrong."""
    with pytest.raises(error, match=text) as caught:
        await Aggregator(settings_for(folder, **changes)).run()
    assert "\n" not in str(caught.value)


async def played(folder, push_all=True):
    """A folder with a finished round, or with one that is open and has one of two updates."""
    async with running_aggregator(folder, rounds=2) as running:
        devices = [await running.device("a"), await running.device("b")]
        tasks = await asyncio.gather(*(device.task() for device in devices))
        await devices[0].push(tasks[0])
        if push_all:
            await devices[1].push(tasks[1])
            await running.until(lambda run, _: run.model_version == 2)
    return running.settings.data_dir, tasks


async def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        await fails_to_start(tmp_path, UsageError, "cannot use the data folder", data_dir=folder)


async def test_a_folder_in_use_is_refused(tmp_path):
    async with running_aggregator(tmp_path) as running:
        await fails_to_start(tmp_path, UsageError, "is in use by another aggregator")
        assert (await running.run()).name == "default"


async def test_a_port_in_use_is_named(tmp_path):
    async with running_aggregator(tmp_path) as running:
        changes = {"address": running.address, "data_dir": tmp_path / "other"}
        await fails_to_start(
            tmp_path, UsageError, f"cannot listen on {running.address}: the port is in use", **changes
        )


async def test_the_folder_of_another_run_is_refused(tmp_path):
    await played(tmp_path)
    await fails_to_start(tmp_path, UsageError, "holds the run 'default', not 'other'", run_name="other")


async def test_a_corrupt_model_is_found_at_the_start(tmp_path):
    folder, _ = await played(tmp_path)
    model = folder / "models" / "000002.safetensors"
    good = model.read_bytes()
    spoiled = bytearray(good)
    spoiled[-1] ^= 1
    for content, text in (
        (bytes(spoiled), "is corrupt: its SHA-256 is not the one recorded"),
        (good[:-1], "is not a safetensors file that fedgrpc can use"),
        (b"", "is not a safetensors file that fedgrpc can use"),
    ):
        model.write_bytes(content)
        await fails_to_start(tmp_path, StorageError, text)
    model.write_bytes(good)
    async with running_aggregator(tmp_path) as running:
        assert (await running.run()).model_version == 2


async def test_a_corrupt_database_is_named(tmp_path):
    folder, _ = await played(tmp_path)
    for path in folder.glob("run.sqlite*"):
        path.unlink()
    (folder / "run.sqlite").write_bytes(b"no database at all, " * 400)
    await fails_to_start(tmp_path, StorageError, "run.sqlite failed: file is not a database")


async def test_an_accepted_update_that_is_gone_or_unreadable_is_an_error_and_not_forgotten(tmp_path):
    folder, tasks = await played(tmp_path, push_all=False)
    update = folder / "uploads" / f"{tasks[0].token}.update"
    good = update.read_bytes()
    update.write_bytes(b"\xff" * 300)
    await fails_to_start(tmp_path, StorageError, "cannot read the update")
    update.write_bytes(b"\0")
    await fails_to_start(tmp_path, StorageError, "cannot read the update")
    update.write_bytes(good)
    async with running_aggregator(tmp_path) as running:
        assert (await running.round()).tasks[0].phase == round_pb2.TASK_PHASE_ACCEPTED


async def test_an_accepted_update_that_was_cut_short_is_left_out_by_name(tmp_path):
    folder, tasks = await played(tmp_path, push_all=False)
    update = folder / "uploads" / f"{tasks[0].token}.update"
    update.write_bytes(update.read_bytes()[:-100])
    async with running_aggregator(tmp_path, rounds=1) as running:
        await HandDrivenDevice(running.stub, "b").push(tasks[1], update_of(3.0))
        assert (await running.until_finished()).model_version == 2
        left_out, counted = (await running.rounds())[0].tasks
        assert left_out.phase == round_pb2.TASK_PHASE_REJECTED
        assert "CRC does not match" in left_out.reason
        assert counted.phase == round_pb2.TASK_PHASE_ACCEPTED
        np.testing.assert_allclose((await HandDrivenDevice(running.stub, "b").model())["b"], MODEL["b"] + 3.0)


def raw_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


async def test_an_initial_model_that_cannot_be_used_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    await fails_to_start(tmp_path, UsageError, "cannot read the model", initial_model=path)
    path.write_text("a pickle?")
    await fails_to_start(tmp_path, UsageError, "is not a safetensors file", initial_model=path)
    save_file({"w": np.array([1.0, np.nan], np.float32)}, path)
    await fails_to_start(tmp_path, UsageError, "'w' of the model .* not finite", initial_model=path)
    save_file({}, path)
    await fails_to_start(tmp_path, UsageError, "has 0 tensors; it may have 1 to 65536", initial_model=path)
    save_file({f"{i:0900}": np.zeros(1, np.float32) for i in range(5000)}, path)
    await fails_to_start(tmp_path, UsageError, "too many for one message", initial_model=path)
    save_file(MODEL, path)
    async with running_aggregator(tmp_path, initial_model=path) as running:
        assert (await running.run()).model_version == 1


async def health_of(running):
    async with open_channel(running.address) as channel:
        request = health_pb2.HealthCheckRequest(service="fedgrpc.v1.Aggregator")
        return (await health_pb2_grpc.HealthStub(channel).Check(request)).status


async def health_becomes(running, status):
    async with open_channel(running.address) as channel, asyncio.timeout(PATIENCE_S):
        request = health_pb2.HealthCheckRequest(service="fedgrpc.v1.Aggregator")
        async for reply in health_pb2_grpc.HealthStub(channel).Watch(request):
            if reply.status == status:
                return


def broken(folder):
    """The folder is away, and a file has taken its place."""
    away = folder.with_name(folder.name + "-away")
    folder.rename(away)
    folder.touch()


def mended(folder):
    folder.unlink()
    folder.with_name(folder.name + "-away").rename(folder)


async def status_of(running):
    """What `fedgrpc status` says."""
    ended = await asyncio.to_thread(fedgrpc, "status", "--aggregator", running.address)
    assert ended.code == 0, ended.error
    return ended.out


async def test_an_upload_that_cannot_be_stored_is_internal_and_the_health_says_so_until_it_can(tmp_path):
    async with running_aggregator(tmp_path) as running:
        a, b = await running.device("a"), await running.device("b")
        a_task, b_task = await asyncio.gather(a.task(), b.task())
        assert await health_of(running) == Serving.SERVING
        uploads = running.settings.data_dir / "uploads"
        broken(uploads)
        with (
            capture_logs() as lines,
            refused("INTERNAL", "cannot store an update: Not a directory", "StorageError"),
        ):
            await a.push(a_task)
        assert ["Not a directory" in line["error"] for line in lines if line["log_level"] == "error"] == [True]
        await health_becomes(running, Serving.NOT_SERVING)
        said = await status_of(running)
        assert "NOT_SERVING" in said
        assert "data folder fails" in said
        mended(uploads)
        assert (await a.push(a_task)).complete
        await health_becomes(running, Serving.SERVING)
        assert "NOT_SERVING" not in await status_of(running)
        assert (await b.push(b_task)).complete
        await running.until_finished()


@pytest.mark.parametrize("name", ["models", "uploads"])
async def test_a_commit_that_cannot_be_stored_is_tried_until_it_can(tmp_path, name):
    """Every accepted update is kept meanwhile."""
    async with running_aggregator(tmp_path) as running:
        a, b = await running.device("a"), await running.device("b")
        a_task, b_task = await asyncio.gather(a.task(), b.task())
        await a.push(a_task)
        folder = running.settings.data_dir / name
        if name == "models":
            broken(folder)
            assert (await b.push(b_task, update_of(3.0))).complete
        else:
            await b.push(b_task, update_of(3.0))
            broken(folder)
        if name == "models":
            await health_becomes(running, Serving.NOT_SERVING)
            assert (await running.run()).model_version == 1
        mended(folder)
        await health_becomes(running, Serving.SERVING)
        await running.until_finished()
        np.testing.assert_allclose(running.weights(2)["w"], MODEL["w"] + 2, rtol=1e-6)
        assert running.kept_updates() == []


async def test_a_model_that_no_encoding_of_the_run_can_hold_travels_as_it_is(tmp_path):
    """70000 is not finite in float16; the run goes on all the same."""
    async with running_aggregator(tmp_path, rounds=2, download_recipe="float16") as running:
        a, b = await running.device("a"), await running.device("b")
        for _ in range(2):
            tasks = await asyncio.gather(a.task(), b.task())
            model = await a.model(tasks[0])
            await asyncio.gather(*(d.push(t, update_of(70_000.0)) for d, t in zip((a, b), tasks, strict=True)))
        np.testing.assert_array_equal(model["w"], running.weights(2)["w"])
        await running.until_finished()


async def test_updates_whose_sum_is_not_finite_cost_their_round_and_not_the_model(tmp_path):
    async with running_aggregator(tmp_path, rounds=2, server_learning_rate=1e23) as running:
        a, b = await running.device("a"), await running.device("b")
        for change in (1e-23, 1e16, 1e-23):
            tasks = await asyncio.gather(a.task(), b.task())
            await asyncio.gather(*(d.push(t, update_of(change)) for d, t in zip((a, b), tasks, strict=True)))
        run = await running.until_finished()
        rounds = await running.rounds()
        assert [item.phase for item in rounds] == [
            round_pb2.ROUND_PHASE_COMMITTED,
            round_pb2.ROUND_PHASE_ABANDONED,
            round_pb2.ROUND_PHASE_COMMITTED,
        ]
        assert "would not be finite in float32" in rounds[1].reason
        assert {task.phase for task in rounds[1].tasks} == {round_pb2.TASK_PHASE_REJECTED}
        assert run.model_version == 3


async def test_old_files_that_cannot_be_removed_hold_up_no_round(tmp_path, monkeypatch):
    async with running_aggregator(tmp_path, rounds=3, keep_versions=1) as running:
        models = running.aggregator.coordinator.encoded_models
        prune, tries = models.prune, []

        async def fails(keep, *also):
            tries.append(keep)
            if len(tries) < 3:
                raise StorageError("cannot remove an old model: Input/output error")
            await prune(keep, *also)

        monkeypatch.setattr(models, "prune", fails)
        for _ in range(3):
            a, b = await running.device("a"), await running.device("b")
            a_task, b_task = await asyncio.gather(a.task(), b.task())
            await asyncio.gather(a.push(a_task), b.push(b_task))
        await running.until_finished()
        assert len(tries) >= 1
        assert running.aggregator.coordinator.data_folder.healthy


async def test_models_without_their_database_are_not_begun_anew(tmp_path):
    data_dir, _ = await played(tmp_path)
    for path in data_dir.glob("run.sqlite*"):
        path.unlink()
    await fails_to_start(tmp_path, UsageError, "knows of no run: restore run.sqlite")


async def test_a_database_without_its_log_holds_the_run_up_to_its_last_commit(tmp_path):
    """What a copy of `run.sqlite` alone is."""
    data_dir = tmp_path / "copy"
    async with running_aggregator(tmp_path, rounds=2) as running:
        devices = [await running.device("a"), await running.device("b")]
        tasks = await asyncio.gather(*(device.task() for device in devices))
        await asyncio.gather(*(device.push(task) for device, task in zip(devices, tasks, strict=True)))
        await running.until(lambda run, _: run.model_version == 2)
        data_dir.mkdir()
        shutil.copy(running.settings.data_dir / "run.sqlite", data_dir / "run.sqlite")
        shutil.copytree(running.settings.data_dir / "models", data_dir / "models")
    async with running_aggregator(tmp_path, rounds=2, data_dir=data_dir) as again:
        assert (await again.run()).model_version == 2


async def test_a_database_that_is_older_than_the_models_is_refused(tmp_path):
    data_dir, _ = await played(tmp_path)
    for version in (3, 4):
        shutil.copy(data_dir / "models" / "000002.safetensors", data_dir / "models" / f"{version:06d}.safetensors")
    await fails_to_start(tmp_path, UsageError, "its database is older and ends with 2")


async def test_a_model_of_a_commit_that_a_crash_cut_off_is_written_anew(tmp_path):
    data_dir, _ = await played(tmp_path)
    shutil.copy(data_dir / "models" / "000002.safetensors", data_dir / "models" / "000003.safetensors")
    async with running_aggregator(tmp_path, rounds=2) as again:
        assert (await again.run()).model_version == 2


async def test_a_database_whose_last_model_is_missing_is_refused(tmp_path):
    data_dir, _ = await played(tmp_path)
    (data_dir / "models" / "000002.safetensors").unlink()
    await fails_to_start(tmp_path, UsageError, "is missing: restore both from one copy")


async def test_accepted_updates_that_the_database_does_not_know_are_told_of(tmp_path):
    data_dir, _ = await played(tmp_path)
    (data_dir / "uploads" / "unknown.update").write_bytes(b"x")
    with capture_logs() as lines:
        async with running_aggregator(tmp_path, rounds=2):
            pass
    assert [line["updates"] for line in lines if line["event"] == "accepted updates removed"] == [1]


async def test_a_base_model_that_changed_while_the_aggregator_runs_makes_no_version(tmp_path):
    async with running_aggregator(tmp_path, rounds=2) as running:
        a, b = await running.device("a"), await running.device("b")
        a_task, b_task = await asyncio.gather(a.task(), b.task())
        path = running.aggregator.coordinator.models.path(1)
        content = path.read_bytes()
        damaged = bytearray(content)
        damaged[-3] ^= 0x40
        with path.open("r+b") as file:
            file.write(damaged)
        with capture_logs() as lines:
            await asyncio.gather(a.push(a_task), b.push(b_task))
            await health_becomes(running, Serving.NOT_SERVING)
        assert any("is corrupt" in line.get("error", "") for line in lines)
        with path.open("r+b") as file:
            file.write(content)
        await running.until(lambda run, _: run.model_version == 2)


async def test_an_optimizer_state_that_has_changed_is_named_at_the_start(tmp_path):
    how = {"rounds": 2, "server_optimizer": "fedadam"}
    async with running_aggregator(tmp_path, **how) as running:
        devices = [await running.device("a"), await running.device("b")]
        tasks = await asyncio.gather(*(device.task() for device in devices))
        await asyncio.gather(*(device.push(task) for device, task in zip(devices, tasks, strict=True)))
        await running.until(lambda run, _: run.model_version == 2)
    state = running.settings.data_dir / "optimizer" / "000002.safetensors"
    damaged = bytearray(state.read_bytes())
    damaged[-2] ^= 0x40
    state.write_bytes(damaged)
    await fails_to_start(tmp_path, StorageError, r"optimizer/000002\.safetensors is corrupt", **how)


@pytest.mark.parametrize("recipe", ["int8+zstd", "raw"])
async def test_an_encoded_model_that_changed_on_the_disk_is_not_sent_again_and_again(
    tmp_path, monkeypatch, recipe
):
    monkeypatch.setattr("fedgrpc.aggregator.encoded_models._LOOK_INTERVAL_S", 0.0)
    async with running_aggregator(tmp_path, download_recipe=recipe) as running:
        a, b = await running.device("a"), await running.device("b")
        a_task, _ = await asyncio.gather(a.task(), b.task())
        _, good = await a.pull(a_task)
        data_dir = running.settings.data_dir
        path = next((data_dir / "encoded").glob("*.payload"), data_dir / "models" / "000001.safetensors")
        content = path.read_bytes()
        with path.open("r+b") as file:
            file.seek(len(content) - 3)
            file.write(bytes([content[-3] ^ 0x40]))
        with refused("INTERNAL", "changed on the disk", "StorageError"):
            await a.pull(a_task)
        if recipe == "raw":
            with refused("INTERNAL", "is corrupt", "StorageError"):
                await a.pull(a_task)
            path.write_bytes(content)
        _, again = await a.pull(a_task)
        assert again == good


@pytest.mark.parametrize(("mode", "warnings"), [(0o755, 1), (0o770, 0), (0o700, 0)])
async def test_a_data_folder_that_anybody_may_enter_is_warned_of(tmp_path, mode, warnings):
    folder = settings_for(tmp_path).data_dir
    folder.mkdir(parents=True)
    folder.chmod(mode)
    with capture_logs() as lines:
        async with running_aggregator(tmp_path):
            pass
    assert sum(line["event"] == "others may enter the data folder" for line in lines) == warnings
