"""Payloads of versions, each made once: what a worker gets, by what it holds."""

import asyncio
from contextlib import asynccontextmanager

import numpy as np
import pytest

from fedgrpc.aggregator.encoded_models import EncodedModels
from fedgrpc.aggregator.model_store import ModelStore
from fedgrpc.aggregator.payload_encoder import Pull
from fedgrpc.codec.layout import layout_of
from fedgrpc.codec.payload import PayloadReader, tensors_of
from fedgrpc.codec.recipe import Recipe
from fedgrpc.errors import NotFound
from fedgrpc.runs.task_context import Downlink
from fedgrpc.storage.model_file import write_model
from fedgrpc.submodels.channels import SubModel

INT8, RAW = Recipe.parse("int8"), Recipe.parse("raw")
LOSSY, LOSSLESS = Downlink(INT8, INT8), Downlink(RAW)


class Versions:
    """Versions that grow by a little each, and the payloads of them."""

    def __init__(self, folder, **how):
        self.folder = folder
        self.store = ModelStore(folder)
        self.encoded = EncodedModels(folder, self.store, **how)
        self._rng = np.random.default_rng(1)
        self.weights = {0: {"w": self._rng.normal(size=(50, 40)).astype(np.float32)}}

    def write(self, *versions):
        for version in versions:
            change = self._rng.normal(scale=0.01, size=(50, 40)).astype(np.float32)
            self.weights[version] = {"w": self.weights[version - 1]["w"] + change}
            write_model(self.store.path(version), layout_of(self.weights[version]), self.weights[version].values())

    async def pull(self, version, held=None, downlink=LOSSY, sub_model=None):
        return await self.encoded.get(Pull(version, downlink, held, sub_model or SubModel()))

    async def holding(self, version, held=None):
        """What a worker holds that has pulled a version, as it names it."""
        return version, (await self.pull(version, held)).manifest.digest


@asynccontextmanager
async def versions_in(folder, **how):
    versions = Versions(folder, **how)
    try:
        yield versions
    finally:
        versions.encoded.close()


def tensors_in(encoded):
    return tensors_of(PayloadReader(encoded.manifest, encoded.payload.read))


async def test_a_worker_that_holds_nothing_gets_the_whole_model_and_one_that_holds_it_gets_nothing(tmp_path):
    async with versions_in(tmp_path) as versions:
        versions.write(1)
        whole = await versions.pull(1)
        assert (whole.base_version, whole.payload.size_bytes) == (0, whole.manifest.size_bytes)
        unchanged = await versions.pull(1, (1, whole.manifest.digest))
        assert (unchanged.base_version, unchanged.payload, unchanged.manifest.size_bytes) == (1, None, 0)


async def test_a_lossless_model_that_is_held_is_not_sent_again(tmp_path):
    async with versions_in(tmp_path) as versions:
        versions.write(1)
        whole = await versions.pull(1, downlink=LOSSLESS)
        assert (await versions.pull(1, (1, whole.manifest.digest), LOSSLESS)).payload is None
        assert (await versions.pull(1, (1, bytes(16)), LOSSLESS)).manifest == whole.manifest


async def test_without_differences_all_have_a_version_in_one_form(tmp_path):
    """A worker that holds it in another form, by a difference of former settings, gets it whole."""
    async with versions_in(tmp_path) as versions:
        versions.write(1, 2)
        by_difference = await versions.holding(2, await versions.holding(1))
        whole = await versions.pull(2, by_difference, Downlink(INT8))
        assert (whole.base_version, whole.payload.size_bytes) == (0, whole.manifest.size_bytes)
        assert (await versions.pull(2, (2, whole.manifest.digest), Downlink(INT8))).payload is None


async def test_a_worker_gets_the_difference_to_what_it_holds_also_over_versions_that_it_missed(tmp_path):
    async with versions_in(tmp_path) as versions:
        versions.write(1, 2, 3)
        held = await versions.holding(1)
        start = tensors_in(await versions.pull(1))["w"]
        difference = await versions.pull(3, held)
        assert (difference.version, difference.base_version) == (3, 1)
        now = start + tensors_in(difference)["w"]
        # Off by what the last payload lost, a step of int8 of the change, and not of the model.
        assert np.abs(now - versions.weights[3]["w"]).max() < 1e-3 < np.abs(start - versions.weights[1]["w"]).max()


@pytest.mark.parametrize("held", [(1, bytes(16)), (1, b""), (3, bytes(16))], ids=["unknown", "none", "newer"])
async def test_who_holds_what_is_not_known_gets_the_whole_model(tmp_path, held):
    async with versions_in(tmp_path) as versions:
        versions.write(1, 2)
        await versions.holding(1)
        assert (await versions.pull(2, held)).base_version == 0


async def test_a_difference_that_is_larger_than_the_model_is_not_sent_and_leaves_no_file(tmp_path):
    async with versions_in(tmp_path) as versions:
        versions.write(1, 2)
        downlink = Downlink(INT8, Recipe.parse("float16"))
        first = await versions.pull(1, downlink=downlink)
        whole = await versions.pull(2, downlink=downlink)
        assert await versions.pull(2, (1, first.manifest.digest), downlink) is whole
        assert len([*tmp_path.glob("encoded/000002-*")]) == 1
        assert len([*tmp_path.glob("delta-bases/000002-*")]) == 1


@pytest.mark.parametrize("wholes", [True, False], ids=["same process", "restarted"])
async def test_what_others_have_pulled_does_not_decide_between_a_difference_and_the_whole(tmp_path, wholes):
    downlink = Downlink(Recipe.parse("int8+zstd"), Recipe.parse("int8+zstd"))
    async with versions_in(tmp_path) as versions:
        versions.write(1)
        # The whole of it compresses to next to nothing, and the difference to noise does not.
        write_model(versions.store.path(2), layout_of(versions.weights[1]), [np.zeros((50, 40), np.float32)])
        held = 1, (await versions.pull(1, downlink=downlink)).manifest.digest
    async with versions_in(tmp_path) as versions:
        if wholes:
            await versions.pull(2, downlink=downlink)
        assert (await versions.pull(2, held, downlink)).base_version == 1


async def test_few_differences_are_made_whatever_workers_hold(tmp_path):
    async with versions_in(tmp_path) as versions:
        versions.write(1, 2, 3, 4, 5, 6)
        held = [await versions.holding(version) for version in range(1, 6)]
        made = [await versions.pull(6, base) for base in held]
        assert [encoded.base_version for encoded in made] == [1, 2, 3, 0, 0]
        again = [await versions.pull(6, base) for base in held]
        assert [one is other for one, other in zip(made, again, strict=True)] == [True] * 5


async def test_all_who_ask_at_once_share_one_payload(tmp_path):
    async with versions_in(tmp_path) as versions:
        versions.write(1)
        one, *others = await asyncio.gather(*(versions.pull(1) for _ in range(5)))
        assert all(other is one for other in others)


async def test_what_cannot_be_encoded_is_refused_each_time_and_made_once_it_can(tmp_path):
    def find_channels(sub_model, version):
        raise NotFound("the channels of this model are not known")

    async with versions_in(tmp_path, find_channels=find_channels) as versions:
        for _ in range(2):
            with pytest.raises(NotFound, match="version 1"):
                await versions.pull(1)
        versions.write(1)
        with pytest.raises(NotFound, match="channels"):
            await versions.pull(1, sub_model=SubModel(0.5))


async def test_old_versions_go_while_a_difference_to_one_is_being_made(tmp_path):
    async with versions_in(tmp_path) as versions:
        versions.write(1, 2, 3)
        held = await versions.holding(1)
        started, go_on = asyncio.Event(), asyncio.Event()
        loop, source = asyncio.get_running_loop(), versions.encoded._encoder._source

        def slowly(variant):
            found = source(variant)
            loop.call_soon_threadsafe(started.set)
            asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result()
            return found

        versions.encoded._encoder._source = slowly
        making = asyncio.create_task(versions.pull(3, held))
        await started.wait()
        await versions.encoded.prune(frozenset({2, 3}))
        go_on.set()
        assert (await making).base_version == 1
        assert versions.store.versions() == [2, 3]
