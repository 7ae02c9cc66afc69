"""Payloads of model versions, each encoded once and shared by every worker that pulls it.

encoded/000007-3.payload    version 7 in one recipe, or its difference; made again by each process
delta-bases/                versions as devices hold them (fedgrpc.aggregator.delta_bases)

The rule: whatever recipe made what a worker holds, the difference is to that. A worker that holds what few others
do gets the whole model, and so holds the same as others again.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Final

import structlog

from fedgrpc.aggregator.chunk_cache import CACHE_BYTES, SENDING_BYTES, ChunkCache, PayloadFile
from fedgrpc.aggregator.delta_bases import DeltaBases
from fedgrpc.aggregator.model_store import ModelStore, outdated
from fedgrpc.aggregator.payload_encoder import EncodedModel, FindChannels, PayloadEncoder, Pull, Variant
from fedgrpc.codec.chunk import LARGE_CHUNK_BYTES
from fedgrpc.errors import FedgrpcError, StorageError
from fedgrpc.storage.files import make_private, storage_errors

log = structlog.get_logger()

# Workers that hold other bases than these few get the whole model, and so hold the same one again.
_MAX_DIFFERENCES: Final = 3
# Encoding a model may take minutes. Uploads have threads of their own, so they do not wait for it.
_ENCODERS: Final = 2
# Time between two reads of a payload that many workers pull.
_LOOK_INTERVAL_S: Final = 5.0


class EncodedModels:
    """The payloads of one run's versions. Lives on one event loop; encoding has threads of its own."""

    def __init__(
        self,
        data_dir: Path,
        models: ModelStore,
        find_channels: FindChannels = lambda sub_model, version: None,
        downlinks: int = 1,
        max_chunk_bytes: int = LARGE_CHUNK_BYTES,
    ) -> None:
        """`downlinks` is how many ways there are for models to travel in this run. Raises OSError."""
        self._models = models
        # Workers of each further recipe hold a version in a form of their own.
        self._max_differences = _MAX_DIFFERENCES + downlinks - 1
        self._folder = data_dir / "encoded"
        make_private(self._folder)
        # Payloads of a former process are made again: their recipes and seeds are the same, and so are the bytes.
        for path in self._folder.iterdir():
            path.unlink(missing_ok=True)
        self._bases = DeltaBases(data_dir / "delta-bases")
        self._encoder = PayloadEncoder(self._folder, models, self._bases, find_channels)
        self._made: dict[Variant, asyncio.Future[EncodedModel | None]] = {}
        self._looked_at: dict[Variant, float] = {}
        self._encoders = ThreadPoolExecutor(_ENCODERS, thread_name_prefix="encoding")
        self.chunk_cache = ChunkCache(CACHE_BYTES, SENDING_BYTES, max_chunk_bytes=max_chunk_bytes)

    def close(self) -> None:
        """Begin no further encoding."""
        self._encoders.shutdown(wait=False, cancel_futures=True)

    async def get(self, pull: Pull) -> EncodedModel:
        """Return what a worker is to pull: the difference to what it holds, else the whole model.

        Raises `NotFound`, also for a sub-model while the channels are not known, and `StorageError`.
        """
        variant = self._variant_for(pull)
        if variant is None:
            return EncodedModel.unchanged(pull.version)
        encoded = await self._shared(variant) or await self._shared(Variant.whole_of(pull))
        assert encoded is not None
        # A worker may hold this very payload, of a version whose base is gone.
        holds_it = pull.held == (pull.version, encoded.manifest.digest)
        return EncodedModel.unchanged(pull.version) if holds_it else encoded

    def _variant_for(self, pull: Pull) -> Variant | None:
        """Choose the payload; None: the worker holds the version already."""
        whole, held, recipe = Variant.whole_of(pull), pull.held, pull.downlink.difference
        # Without differences all have a version in one form: what a worker holds of it may be another.
        if held is None or recipe is None or not pull.reduction.nothing:
            return whole
        if not self._bases.knows((*held, pull.sub_model.name)):
            return whole
        # Known as a delta base, so these are the bytes that the worker got of this version.
        if held[0] == pull.version:
            return None
        if held[0] > pull.version:
            return whole
        difference = replace(whole, recipe=recipe, base=held, whole=pull.downlink.whole, kept=True)
        if difference in self._made or self._difference_count(whole) < self._max_differences:
            return difference
        return whole

    def _difference_count(self, whole: Variant) -> int:
        about = whole.version, whole.sub_model_name
        return sum(made.base is not None and (made.version, made.sub_model_name) == about for made in self._made)

    async def _shared(self, variant: Variant) -> EncodedModel | None:
        """Return a payload, made once for all who ask; None for a difference that is worth nothing.

        One that changed on the disk is made again next time.
        """
        if variant not in self._made:
            # The future itself is kept, so that all who ask meanwhile wait for one encoding.
            self._made[variant] = asyncio.get_running_loop().run_in_executor(
                self._encoders, self._encoder.encode, variant
            )
        try:
            # The first to ask may leave while others wait for the same payload.
            made = await asyncio.shield(self._made[variant])
            if made is not None and made.payload is not None:
                await self._look_at(variant, made.payload)
        except FedgrpcError:
            # The next one tries again: a full disk may have room by then.
            self._made.pop(variant, None)
            raise
        return made

    async def _look_at(self, variant: Variant, payload: PayloadFile) -> None:
        """Read a payload through now and then, before it is sent. Raises `StorageError`."""
        now = time.monotonic()
        if now - self._looked_at.setdefault(variant, now) < _LOOK_INTERVAL_S:
            return
        # Before the read: workers that ask meanwhile do not read it, too.
        self._looked_at[variant] = now
        if not await asyncio.to_thread(lambda: payload.as_written):
            self.chunk_cache.forget(payload)
            log.error("encoded model has changed on the disk", version=variant.version, recipe=str(variant.recipe))
            raise StorageError(f"a payload of version {variant.version} has changed on the disk; ask again")

    async def prune(self, keep: frozenset[int], models: frozenset[int] = frozenset()) -> None:
        """Remove all of every version that is not in `keep`; the models themselves stay if in `models`."""
        # On the event loop, before the thread removes files: from here on nobody is given one of these.
        gone = [variant for variant in self._made if variant.version not in keep]
        pulled = {variant.version for variant in gone if self._let_go(variant)}
        await asyncio.to_thread(self._remove_files, keep, models, pulled)

    def _let_go(self, variant: Variant) -> bool:
        """Forget a payload; return whether it is still being pulled."""
        made = self._made.pop(variant)
        self._looked_at.pop(variant, None)
        # Still being encoded, from the model's file.
        if not made.done():
            return True
        if made.cancelled() or made.exception() is not None:
            return False
        encoded = made.result()
        if encoded is None or encoded.payload is None:
            return False
        self.chunk_cache.forget(encoded.payload)
        # Every stream holds its payload: once the references here are gone, only theirs are left.
        pulling = weakref.ref(encoded.payload)
        del made, encoded
        return pulling() is not None

    def _remove_files(self, keep: frozenset[int], models: frozenset[int], pulled: set[int]) -> None:
        with storage_errors("an old model", "remove"):
            # Workers that have waited for the oldest version of `keep` hold the one before it.
            self._bases.prune(keep | {min(keep) - 1})
            for path in outdated(self._folder, keep):
                # Its readers keep it open, and so whole.
                path.unlink(missing_ok=True)
        self._models.prune(keep, models, pulled)
