"""`fedgrpc model` and `fedgrpc release`: with a running aggregator, and on the folder of one that has ended."""

import asyncio
import json
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedgrpc.cli.main import run as run_command
from fedgrpc.model_client import download
from fedgrpc.storage.database import DATABASE
from fedgrpc.storage.model_diff import differences
from fedgrpc.storage.model_file import ModelFile
from fedgrpc.storage.run_store import RunStore
from tests.support.running_federation import ShiftTrainer, running_aggregator, start_worker


def command(capsys, *arguments):
    code = run_command(arguments)
    out, error = capsys.readouterr()
    return code, out, error


async def commands(capsys, *each):
    """Run commands beside the aggregator of this event loop, one after the other."""
    return [await asyncio.to_thread(command, capsys, *arguments) for arguments in each]


@pytest.fixture
async def ended_run(tmp_path):
    """The data folder of a run of three versions that has ended, with nothing running."""
    policy = {"min_workers": 1}
    async with running_aggregator(tmp_path, rounds=2, policy=policy, learning_task="tasks:Mine") as aggregator:
        worker = start_worker(aggregator, tmp_path, "pi-1", ShiftTrainer())
        await aggregator.until_finished()
        await worker
        yield aggregator
    assert aggregator.task.done()


def header_of(path):
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]


async def test_versions_are_listed_got_tagged_and_compared_while_the_aggregator_runs(ended_run, tmp_path, capsys):
    where = ("--aggregator", ended_run.address)
    file = tmp_path / "got.safetensors"
    listed, tagged, got, diff, gone, lost = await commands(
        capsys,
        ("model", "list", *where),
        ("model", "tag", "default@2", "v1.0", *where),
        ("model", "get", "@v1.0", "--to", str(file), *where),
        ("model", "diff", "@1", "@final", "--json", *where),
        ("model", "tag", "default", "v1.0", "--remove", *where),
        ("model", "get", "@v1.0", "--to", str(file), *where),
    )
    assert listed[0] == 0
    assert [line.split()[0] for line in listed[1].splitlines()] == ["version", "1", "2", "3"]
    assert "latest" in listed[1]
    assert "default@2" in tagged[1]
    assert got[0] == 0, got
    for name, array in ended_run.weights(2).items():
        assert np.array_equal(load_file(file)[name], array)
    about = header_of(file)
    assert (about["run"], about["version"], about["task"], about["tags"]) == ("default", "2", "tasks:Mine", "v1.0")
    assert re.fullmatch("[0-9a-f]{64}", about["digest"])
    assert ModelFile.open(file).as_written
    changes = {each["name"]: each for each in json.loads(diff[1])}
    assert changes["w"]["largest"] == pytest.approx(2.0, abs=1e-5)
    assert gone[0] == 0
    assert (lost[0], "no version has the tag" in lost[2]) == (1, True)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".got")]


async def test_commands_of_releases_and_runs_take_a_run_and_say_what_is_not_there(ended_run, capsys):
    where = ("--aggregator", ended_run.address)
    started, aborted, empty, unknown, settings = await commands(
        capsys,
        ("release", "default@best", "--canary", "nobody", "--after", "1s", *where),
        ("release", "abort", *where),
        ("release", "list", *where),
        ("release", "show", "default", *where),
        ("run", "show", "default", *where),
    )
    assert started[0] == 2
    assert "'nobody' is no device" in started[2]
    assert "it has pi-1" in started[2]
    assert (aborted[0], "no release is in progress" in aborted[2]) == (1, True)
    assert "nothing was released" in empty[1]
    assert {"deadline", "lease", "upload_encoding"} <= {line.split()[0] for line in settings[1].splitlines()}
    assert (unknown[0], "run default has no release yet" in unknown[2]) == (1, True)


def test_where_no_aggregator_runs_the_data_folder_is_read(tmp_path, capsys):
    async def played():
        async with running_aggregator(tmp_path, rounds=1, policy={"min_workers": 1}) as aggregator:
            worker = start_worker(aggregator, tmp_path, "pi-1", ShiftTrainer())
            await aggregator.until_finished()
            await worker
        return aggregator

    aggregator = asyncio.run(played())
    where, file = ("--data-dir", str(aggregator.settings.data_dir)), tmp_path / "final.safetensors"
    assert command(capsys, "model", "tag", "@2", "shipped", *where)[0] == 0
    code, out, _ = command(capsys, "model", "list", "--json", *where)
    listed = json.loads(out)
    assert (code, listed["run"]) == (0, "default")
    assert [each["tags"] for each in listed["versions"]] == [[], ["shipped"]]
    assert command(capsys, "model", "get", "@final", "--to", str(file), *where)[0] == 0
    assert np.array_equal(load_file(file)["w"], aggregator.weights(2)["w"])
    assert header_of(file)["tags"] == "shipped"
    assert command(capsys, "model", "get", "other@final", "--to", str(file), *where)[0] == 1
    assert command(capsys, "model", "tag", "@2", "best", *where)[0] == 2

    host = tmp_path / "host"
    shutil.copytree(aggregator.settings.data_dir, host / "runs" / "default")
    RunStore(host / DATABASE).close()
    where = ("--data-dir", str(host))
    assert "shipped" in command(capsys, "model", "list", *where)[1]
    assert "run default" in command(capsys, "status", *where)[1]


async def test_a_download_that_broke_off_goes_on_and_another_payload_starts_over(ended_run, tmp_path):
    from fedgrpc.calls import connect

    path, asked = tmp_path / "model.safetensors", []
    async with connect(ended_run.address) as client:
        stream = client.models.stream_of("", 2)

        def counted(broken):
            async def counting(offset):
                asked.append(offset)
                async for message in stream(offset):
                    yield message
                    if broken and not hasattr(message, "manifest"):
                        raise KeyboardInterrupt

            return counting

        with pytest.raises(KeyboardInterrupt):
            await download(counted(True), path, {})
        assert not path.exists()
        await download(counted(False), path, {})
        assert asked[0] == 0
        assert asked[1] > 0
        assert np.array_equal(load_file(path)["w"], ended_run.weights(2)["w"])
        with pytest.raises(KeyboardInterrupt):
            await download(counted(True), path, {})
        stream = client.models.stream_of("", 3)
        await download(counted(False), path, {})
        assert np.array_equal(load_file(path)["w"], ended_run.weights(3)["w"])


def test_differences_name_what_is_only_in_one_file(tmp_path):
    before, after = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({"w": np.array([3.0, 4.0], np.float32), "old": np.zeros(1), "s": np.zeros(2)}, before)
    save_file({"w": np.array([3.0, 2.0], np.float32), "new": np.zeros(1), "s": np.zeros(3)}, after)
    found = {each.name: each for each in differences(ModelFile.open(before), ModelFile.open(after))}
    assert (found["w"].norm, found["w"].change, found["w"].largest) == (5.0, 2.0, 2.0)
    assert (found["old"].note, found["new"].note) == ("only before", "only after")
    assert "another shape" in found["s"].note
