"""Models on their way down: differences to what a worker really holds (Tang et al., arXiv 1905.05957)."""

import asyncio

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.codec.payload import PayloadReader, buffer_reader, tensors_of
from fedgrpc.errors import UsageError
from fedgrpc.protocol.tensors import manifest_from_proto
from fedgrpc.rpc.channel import open_channel
from fedgrpc.trainer import TrainResult
from fedgrpc.worker.client import AggregatorClient
from fedgrpc.worker.held_model import Source
from fedgrpc.worker.model_folder import ModelFolder
from tests.support.hand_driven_device import PATIENCE_S
from tests.support.running_federation import ShiftTrainer, running_aggregator, start_worker

INT8 = {"download_recipe": "int8+zstd"}
ALONE = {"min_workers": 1}


@pytest.fixture(autouse=True)
def initial_model(tmp_path):
    """As trained weights are: nothing that zstd could make small."""
    rng = np.random.default_rng(3)
    model = {"w": rng.normal(size=(50, 40)), "b": rng.normal(size=40)}
    tensors = {name: values.astype(np.float32) for name, values in model.items()}
    save_file({**tensors, "n": np.array(3, np.int64)}, tmp_path / "initial.safetensors")


class Holder:
    """A device by hand that keeps what it pulled, as a worker does."""

    def __init__(self, device):
        self.device = device
        self.key = (0, b"")
        self.weights = {}

    async def pull(self, task, offset=0):
        header, payload = await self.device.pull(task, offset, base=self.key)
        if not offset:
            self._take(header, payload)
        return header, payload

    def _take(self, header, payload):
        arrived = tensors_of(PayloadReader(manifest_from_proto(header.manifest), buffer_reader(payload)))
        if header.base_version == header.version:
            return
        if header.base_version:
            assert header.base_version == self.key[0]
            arrived = {n: self.weights[n] + a if a.dtype.kind == "f" else a for n, a in arrived.items()}
        self.weights = arrived
        self.key = (header.version, header.manifest.digest)

    def is_off_by(self, version_weights):
        return max(float(np.abs(self.weights[n] - a).max()) for n, a in version_weights.items())


def an_update(seed, size=0.01):
    rng = np.random.default_rng(seed)
    return {
        "w": rng.normal(scale=size, size=(50, 40)).astype(np.float32),
        "b": rng.normal(scale=size, size=40).astype(np.float32),
        "n": np.array(seed, np.int64),
    }


async def a_round(holder, seed, size=0.01):
    """Pull what the task names, push an update."""
    task = await holder.device.task(held=holder.key)
    header, payload = await holder.pull(task)
    await holder.device.push(task, an_update(seed, size))
    return header, payload


def held_on_disk(running, version):
    found = sorted((running.settings.data_dir / "delta-bases").glob(f"{version:06d}-*.safetensors"))
    return {bytes.fromhex(path.stem.partition("-")[2]): load_file(path) for path in found}


async def test_a_worker_that_holds_a_version_gets_the_difference_and_errors_do_not_add_up(tmp_path):
    async with running_aggregator(tmp_path, rounds=6, policy=ALONE, **INT8) as running:
        holder = Holder(await running.device("a"))
        header, _ = await a_round(holder, 0)
        assert header.base_version == 0
        whole_error = holder.is_off_by(running.weights(1))
        assert whole_error > 1e-3
        for number in range(1, 6):
            header, _ = await a_round(holder, number)
            assert (header.version, header.base_version) == (number + 1, number)
            # What is off is what the last difference lost: a step of int8 of an update, not of the model.
            assert holder.is_off_by(running.weights(number + 1)) < 1e-3 < whole_error
            assert holder.weights["n"] == number - 1


async def test_the_aggregator_keeps_bit_for_bit_what_workers_hold(tmp_path):
    trained = {}

    class Noisy(ShiftTrainer):
        def train(self, weights, job):
            trained.setdefault(job.round, []).append({name: np.array(a) for name, a in weights.items()})
            rng = np.random.default_rng(job.seed)
            moved = {n: a + rng.normal(size=a.shape).astype(a.dtype) / 100 for n, a in weights.items() if n != "n"}
            return TrainResult({**moved, "n": weights["n"] + 1}, 10, 1, {})

    async with running_aggregator(
        tmp_path, rounds=4, keep_versions=9, upload_recipe="int8+zstd", **INT8
    ) as running:
        codes = await asyncio.wait_for(
            asyncio.gather(*(start_worker(running, tmp_path, name, Noisy()) for name in "ab")), PATIENCE_S
        )
        assert codes == [0, 0]
        assert sorted(trained) == [1, 2, 3, 4]
        for version, by_worker in trained.items():
            (kept,) = held_on_disk(running, version).values()
            for weights in by_worker:
                for name, values in kept.items():
                    np.testing.assert_array_equal(weights[name], values)
        rounds = await running.rounds()
    sizes = {task.download_bytes for task in rounds[-1].tasks}
    assert len(sizes) == 1
    assert 0 < sizes.pop() < 2500


async def test_a_difference_is_made_once_and_shared(tmp_path):
    async with running_aggregator(tmp_path, rounds=2, **INT8) as running:
        holders = [Holder(await running.device(name)) for name in "ab"]
        await asyncio.gather(*(a_round(holder, 1) for holder in holders))
        (first, one), (second, other) = await asyncio.gather(*(a_round(holder, 2) for holder in holders))
        assert first.base_version == 1
        assert (first, one) == (second, other)
        assert len(held_on_disk(running, 2)) == 1


async def test_a_restart_changes_nothing_for_those_who_hold_a_version(tmp_path):
    async with running_aggregator(tmp_path, rounds=3, policy=ALONE, **INT8) as running:
        holder = Holder(await running.device("a"))
        await a_round(holder, 1)
        await running.until_ended(1)
        task = await holder.device.task()
        before, payload = await holder.device.pull(task, base=holder.key)
    async with running_aggregator(tmp_path, rounds=3, policy=ALONE, **INT8) as running:
        holder.device = await running.device("a")
        task = await holder.device.task(held=holder.key)
        # The same bytes, so that a download that was cut off goes on.
        after, tail = await holder.pull(task, offset=100)
        assert (after, tail) == (before, payload[100:])
        header, _ = await holder.pull(task)
        assert header.base_version == 1
        for name, values in held_on_disk(running, 2)[header.manifest.digest].items():
            np.testing.assert_array_equal(holder.weights[name], values)
        await holder.device.push(task, an_update(2))


async def test_a_form_that_is_damaged_or_unknown_costs_a_whole_model_and_no_more(tmp_path):
    async with running_aggregator(tmp_path, rounds=3, policy=ALONE, **INT8) as running:
        holder = Holder(await running.device("a"))
        await a_round(holder, 1)
        await running.until_ended(1)
    (path,) = (tmp_path / "aggregator" / "delta-bases").glob("000001-*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    async with running_aggregator(tmp_path, rounds=3, policy=ALONE, **INT8) as running:
        holder.device = await running.device("a")
        task = await holder.device.task()
        for key in [holder.key, (1, bytes(16)), (1, b""), (7, holder.key[1]), (0, b"")]:
            header, _ = await holder.device.pull(task, base=key)
            assert (header.version, header.base_version) == (2, 0)


async def test_a_worker_that_missed_versions_gets_the_difference_to_what_it_holds(tmp_path):
    recipes = {"download_recipe": "int8+zstd", "difference_recipe": "entropy:c=1+zstd"}
    policy = {"min_workers": 2, "quorum": 1}
    async with running_aggregator(tmp_path, rounds=5, policy=policy, **recipes) as running:
        steady, away = Holder(await running.device("a")), Holder(await running.device("b"))
        for number in (1, 2, 3):
            task, missed = await asyncio.gather(
                steady.device.task(held=steady.key), away.device.task(held=away.key)
            )
            await steady.pull(task)
            if number == 1:
                _, whole = await away.pull(missed)
            if number == 3:
                header, payload = await away.pull(missed)
                break
            await steady.device.push(task, an_update(number))
            await away.device.give_back(missed)
            await running.until_ended(number)
        assert (header.base_version, header.version) == (1, 3)
        assert len(payload) < len(whole) / 2
        # One step of c = 1 is one RMS of the difference.
        assert away.is_off_by(running.weights(3)) < 0.05


async def test_what_is_held_of_the_wanted_version_itself_is_not_sent_again(tmp_path):
    async with running_aggregator(tmp_path, rounds=2, policy=ALONE, **INT8) as running:
        holder = Holder(await running.device("a"))
        await a_round(holder, 1)
        await running.until_ended(1)
        task = await holder.device.task()
        await holder.pull(task)
        header, payload = await holder.pull(task)
        assert (header.base_version, header.version, payload) == (2, 2, b"")
        assert not header.manifest.entries


async def test_a_recipe_may_treat_the_last_layer_and_vectors_otherwise_in_models_and_differences(tmp_path):
    rng = np.random.default_rng(5)
    shapes = {"w": (50, 40), "head": (40, 10), "b": (400,)}
    model = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(model, tmp_path / "initial.safetensors")
    recipe = "float16;@last=int8;@vectors=bfloat16"
    async with running_aggregator(tmp_path, rounds=2, policy=ALONE, download_recipe=recipe) as running:
        device = await running.device("a")
        task = await device.task()
        whole, _ = await device.pull(task)
        await device.push(task, {name: values / 100 for name, values in model.items()})
        await running.until_ended(1)
        held = (1, whole.manifest.digest)
        task = await device.task(held=held)
        difference, _ = await device.pull(task, base=held)
    assert (whole.base_version, difference.base_version) == (0, 1)
    for header in (whole, difference):
        specs = {entry.tensor.name: entry.encoding.spec for entry in header.manifest.entries}
        # A safetensors file has its tensors in an order of its own: the last of the matrices is meant.
        last = [entry.tensor.name for entry in header.manifest.entries if len(entry.tensor.shape) == 2][-1]
        assert specs == {
            "b": "bfloat16",
            **{name: "int8" if name == last else "float16" for name in ("w", "head")},
        }


async def test_a_difference_larger_than_the_model_is_not_sent(tmp_path):
    recipes = {"download_recipe": "int8", "difference_recipe": "float16"}
    async with running_aggregator(tmp_path, rounds=2, policy=ALONE, **recipes) as running:
        holder = Holder(await running.device("a"))
        await a_round(holder, 1)
        header, _ = await a_round(holder, 2)
        assert (header.version, header.base_version) == (2, 0)
        assert set(held_on_disk(running, 2)) == {header.manifest.digest}


async def test_a_lossless_downlink_is_the_version_itself_and_keeps_no_forms(tmp_path):
    async with running_aggregator(tmp_path, rounds=2, policy=ALONE, download_recipe="raw") as running:
        holder = Holder(await running.device("a"))
        await a_round(holder, 1)
        header, _ = await a_round(holder, 2)
        assert header.base_version == 0
        assert holder.is_off_by(running.weights(2)) == 0
        assert not held_on_disk(running, 2)


def test_a_difference_encoding_whose_errors_would_grow_is_refused(tmp_path):
    with pytest.raises(UsageError, match="errors would grow"):
        AggregatorSettings(tmp_path, difference_recipe="entropy:c=5+zstd")


async def test_a_device_that_holds_a_sum_keeps_it_through_its_restart_and_asks_for_nothing_twice(tmp_path):
    async with running_aggregator(tmp_path, rounds=3, policy=ALONE, **INT8) as running:
        run_id = (await running.run()).id
        device = await running.device("b")

        async with open_channel(running.address) as channel:
            client, folder = AggregatorClient(channel, "b"), ModelFolder(tmp_path / "model")

            async def pulled(task, folder):
                return await client.pulls.pull(folder, Source(run_id, task.model_version), task.token)

            async def ended(task):
                await device.push(task, an_update(task.round))
                await running.until_ended(task.round)
                return await device.task()

            task = await device.task()
            await pulled(task, folder)
            task = await ended(task)
            held = await pulled(task, folder)
            assert held.origin_digest != held.manifest.digest
            for name, values in held_on_disk(running, 2)[held.origin_digest].items():
                np.testing.assert_array_equal(held.weights()[name], values)
            assert await pulled(task, folder) is held
            again = ModelFolder(tmp_path / "model")
            assert (again.held.source, again.held.origin_digest) == (held.source, held.origin_digest)
            assert await pulled(task, again) is again.held
            task = await ended(task)
            assert (await pulled(task, again)).origin_digest in held_on_disk(running, 3)
            names = {path.name for path in (tmp_path / "model").iterdir() if path.name.isdigit()}
            assert names == {"00000003"}
