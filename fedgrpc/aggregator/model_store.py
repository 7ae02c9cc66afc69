"""Model versions on disk, and their payloads, each encoded once and shared by every worker.

models/000007.safetensors       version 7
optimizer/000007.safetensors    state of the server optimizer after version 7
encoded/000007-3.payload        version 7 in one recipe, or its difference; made anew by each process
delta-bases/                    versions as devices hold them (fedgrpc.aggregator.delta_bases)
"""

from __future__ import annotations

import asyncio
import re
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import structlog

from fedgrpc.aggregation import partial_update
from fedgrpc.aggregator.chunk_cache import ChunkCache, PayloadFile
from fedgrpc.aggregator.delta_bases import DeltaBases, PayloadSource
from fedgrpc.codec.chunk import LARGE_CHUNK_BYTES
from fedgrpc.codec.layout import Array, Layout
from fedgrpc.codec.manifest import Manifest, TensorEntry
from fedgrpc.codec.payload import write_payload
from fedgrpc.codec.raw import Raw
from fedgrpc.codec.recipe import Recipe
from fedgrpc.errors import EncodeError, Exhausted, FedgrpcError, NotFound, StorageError, UsageError
from fedgrpc.protocol.tensors import manifest_to_proto
from fedgrpc.storage.files import RecycledFiles, make_private, storage_errors, sync
from fedgrpc.storage.model_file import ModelFile, ModelTensors
from fedgrpc.submodels.channels import KeptChannels, SubModel
from fedgrpc.v1.aggregator_pb2 import ModelHeader, PullModelResponse

log = structlog.get_logger()
T = TypeVar("T")

# What a worker says to hold: a version, and the SHA-256 of the payload that made it.
Held = tuple[int, bytes]

_VERSION = re.compile(r"(\d+)(-|\.safetensors$)")

_CHUNK_CACHE_BYTES = 16 << 20
_SENDING_BYTES = 16 << 20
_MAX_RECYCLED = 1
# Workers that hold other bases than these few get the whole model, and so hold the same one again.
_MAX_DIFFERENCES = 3
# A difference that is hardly larger than the model is worth its bytes: it loses far less.
_SLACK = 1.05
# Encoding a model may take minutes. Uploads have threads of their own, so they do not wait for it.
_ENCODERS = 2
# Between two looks at a payload that many pull, seconds.
_LOOK_INTERVAL_S = 5.0


@dataclass(frozen=True)
class Downlink:
    """How models travel to workers: whole, or as a difference to what they hold (None: always whole)."""

    whole: Recipe
    difference: Recipe | None = None


@dataclass(frozen=True)
class Extent:
    """Extent of a payload: a sub-model of a version, or by default the whole model."""

    sub_model: SubModel = field(default_factory=SubModel)
    kept_channels: KeptChannels | None = None

    @property
    def name(self) -> str:
        """Name of the sub-model."""
        return self.sub_model.name

    def layout(self, model: Layout) -> Layout:
        """Return the layout of the payload for a model of that layout."""
        shapes = partial_update.sub_layout(model, self.kept_channels)
        return tuple(replace(spec, shape=shapes[spec.name]) for spec in model)

    def of(self, model: ModelFile) -> Mapping[str, Array]:
        """Return the tensors of the payload, each read and cut out on access."""
        tensors = ModelTensors(model)
        return tensors if self.kept_channels is None else _CutTensors(tensors, self.kept_channels)


WHOLE = Extent()


@dataclass(frozen=True)
class Variant:
    """A payload of a version, by all that decides its bytes.

    `base` is what a difference is taken to, and `whole` the recipe that stands in where the difference is worth
    nothing. `kept`: what it makes its receivers hold is kept, as the base of differences to come.
    """

    version: int
    recipe: Recipe
    sub_model_name: str = ""
    base: Held | None = None
    whole: Recipe | None = None
    kept: bool = False


@dataclass(frozen=True)
class EncodedModel:
    """One version in one recipe, on disk; `base_version` above 0: its difference to a delta base of that version.

    `held_crc32` is of what its receivers then hold.
    """

    version: int
    manifest: Manifest
    payload: PayloadFile
    base_version: int = 0
    held_crc32: int | None = None

    @cached_property
    def header(self) -> bytes:
        """The first message of its stream, serialized."""
        manifest = manifest_to_proto(self.manifest)
        header = ModelHeader(
            version=self.version, manifest=manifest, base_version=self.base_version, held_crc32=self.held_crc32
        )
        return PullModelResponse(header=header).SerializeToString()


class ModelStore:
    """The versions in a data folder."""

    def __init__(
        self, data_dir: Path, downlinks: Sequence[Downlink] = (), max_chunk_bytes: int = LARGE_CHUNK_BYTES
    ) -> None:
        """`downlinks`: those of all workers, the usual one first. Raises OSError."""
        self._downlinks = tuple(downlinks) or (Downlink(Recipe(Raw())),)
        self._max_differences = _MAX_DIFFERENCES + len({downlink.difference for downlink in self._downlinks}) - 1
        self._whole_bytes: dict[tuple[Recipe, str], int] = {}
        self._opened: tuple[tuple[int, ...], ModelFile] | None = None
        self._models = data_dir / "models"
        self._optimizer_states = data_dir / "optimizer"
        self._encoded_folder = data_dir / "encoded"
        for folder in (self._models, self._optimizer_states, self._encoded_folder):
            make_private(folder)
        self.recycled = RecycledFiles(data_dir / "models" / "recycled", _MAX_RECYCLED)
        self._delta_bases = DeltaBases(data_dir / "delta-bases")
        for path in self._encoded_folder.iterdir():
            path.unlink(missing_ok=True)
        self._made: dict[Variant, asyncio.Task[EncodedModel]] = {}
        self._looked_at: dict[Variant, float] = {}
        self._numbers = count(1)
        self._encoders = ThreadPoolExecutor(_ENCODERS, thread_name_prefix="encoding")
        self.chunk_cache = ChunkCache(_CHUNK_CACHE_BYTES, _SENDING_BYTES, max_chunk_bytes=max_chunk_bytes)

    def close(self) -> None:
        """Begin no further encoding."""
        self._encoders.shutdown(wait=False, cancel_futures=True)

    async def in_encoder(self, call: Callable[..., T], *args: object) -> T:
        """Run a call that may take long in the threads that encode."""
        return await asyncio.get_running_loop().run_in_executor(self._encoders, call, *args)

    def path(self, version: int) -> Path:
        """Where `version` is, or will be."""
        return self._models / f"{version:06d}.safetensors"

    def optimizer_state_path(self, version: int) -> Path:
        """Where the server optimizer's state after `version` is, or will be."""
        return self._optimizer_states / f"{version:06d}.safetensors"

    def versions(self) -> list[int]:
        """The versions whose files are here, in order. Raises `StorageError`."""
        with storage_errors(self._models, "read"):
            found = (_VERSION.match(path.name) for path in self._models.iterdir() if path.is_file())
            return sorted(int(match[1]) for match in found if match)

    def open(self, version: int) -> ModelFile:
        """Version `version`. Raises `NotFound`, and `StorageError` when its file is damaged."""
        path = self.path(version)
        try:
            about = path.stat()
        except FileNotFoundError:
            raise NotFound(f"there is no model version {version} here") from None
        except OSError as error:
            raise StorageError(f"cannot read the model {path}: {error.strerror}") from error
        signature = (version, about.st_ino, about.st_size, about.st_mtime_ns)
        if self._opened is None or self._opened[0] != signature:
            self._opened = (signature, _open(path))
        return self._opened[1]

    def open_optimizer_state(self, version: int) -> ModelFile | None:
        """The server optimizer's state after `version`, None where it keeps none."""
        path = self.optimizer_state_path(version)
        return _open(path) if path.exists() else None

    def forget_optimizer_state(self) -> None:
        """Remove the state of a server optimizer: another one would read it wrong. Raises `StorageError`."""
        with storage_errors("the server optimizer's state", "remove"):
            for path in self._optimizer_states.iterdir():
                path.unlink(missing_ok=True)
            # Durable before the run goes on: after a power cut another optimizer would find it again.
            sync(self._optimizer_states)

    def check(self, version: int) -> None:
        """Raise `StorageError` unless a version, and what the server optimizer keeps, are as they were written.

        Raises as `open` too.
        """
        _check(self.open(version))
        if (state := self.open_optimizer_state(version)) is not None:
            _check(state)

    def tensors(self, version: int) -> Mapping[str, Array]:
        """The tensors of `version` by name, each read when it is asked for. Raises as `open`."""
        return ModelTensors(self.open(version))

    async def encoded(
        self,
        version: int,
        recipe: Recipe,
        max_foreign: int | None = None,
        extent: Extent = WHOLE,
    ) -> EncodedModel:
        """`version`, or a sub-model of it, in `recipe`; made once for all who ask.

        Raises `NotFound`, `StorageError`, and `Exhausted` when `max_foreign` others are kept that no worker is
        told to pull.
        """
        variant = Variant(version, recipe, extent.name)
        if variant not in self._made and max_foreign is not None and self._foreign_count(version) >= max_foreign:
            raise Exhausted(f"model version {version} is already kept in {max_foreign} other recipes")
        return await self._encoded(variant, extent)

    async def _encoded(self, variant: Variant, extent: Extent) -> EncodedModel:
        if variant not in self._made:
            encoding = self.in_encoder(self._encode, self.open(variant.version), variant, extent)
            self._made[variant] = asyncio.create_task(encoding)
        return await self._wait_for(variant)

    def _foreign_count(self, version: int) -> int:
        """How many variants are kept of a version beside those which workers are told to pull."""
        own = {downlink.whole for downlink in self._downlinks}
        return sum(
            variant.version == version
            and not (variant.kept or variant.base is not None)
            and not (variant.recipe in own and not variant.sub_model_name)
            for variant in self._made
        )

    async def _whole(self, version: int, downlink: Downlink, extent: Extent) -> EncodedModel:
        """No difference; what it makes its receivers hold is kept where a difference to that may follow."""
        kept = downlink.difference is not None and not extent.sub_model.moves
        return await self._encoded(Variant(version, downlink.whole, extent.name, kept=kept), extent)

    async def offered(
        self, version: int, held: Held | None = None, downlink: Downlink | None = None, extent: Extent = WHOLE
    ) -> EncodedModel:
        """`version`, or a sub-model of it, for a worker that holds `held` of it: the difference to that, or no
        difference where that is not known, the difference would be larger, or the sub-model's channels move.

        Whatever recipe made what is held: the difference is to that. Each is made once for all who ask with the
        same `downlink` (None: the usual one). Raises as `encoded`.
        """
        downlink = downlink or self._downlinks[0]
        recipe = downlink.difference
        if held is None or recipe is None or held[0] >= version or not self.holds(held, extent):
            return await self._whole(version, downlink, extent)
        variant = Variant(version, recipe, extent.name, base=held, whole=downlink.whole)
        if variant not in self._made:
            if self._difference_count(version, extent) >= self._max_differences:
                return await self._whole(version, downlink, extent)
            self._made[variant] = asyncio.create_task(self._difference(variant, downlink, extent))
        return await self._wait_for(variant)

    def _difference_count(self, version: int, extent: Extent) -> int:
        alike = (made for made in self._made if made.version == version and made.sub_model_name == extent.name)
        return sum(made.base is not None for made in alike)

    def holds(self, held: Held, extent: Extent = WHOLE) -> bool:
        """Whether `held` is a delta base of this aggregator, so that a difference to it can be made."""
        return self._delta_bases.knows((*held, extent.name))

    async def _wait_for(self, variant: Variant) -> EncodedModel:
        """A variant once it is made. One that has changed on the disk is forgotten, to be made anew."""
        try:
            made = await asyncio.shield(self._made[variant])
            await self._look_at(variant, made.payload)
        except FedgrpcError:
            self._made.pop(variant, None)
            raise
        return made

    async def _look_at(self, variant: Variant, payload: PayloadFile) -> None:
        """Read a payload through now and then, before it goes to somebody. Raises `StorageError`."""
        now = time.monotonic()
        if now - self._looked_at.setdefault(variant, now) < _LOOK_INTERVAL_S:
            return
        self._looked_at[variant] = now
        if not await asyncio.to_thread(lambda: payload.as_written):
            self.chunk_cache.forget(payload)
            log.error("encoded model has changed on the disk", version=variant.version, recipe=str(variant.recipe))
            raise StorageError(f"a payload of version {variant.version} has changed on the disk; ask again")

    async def _difference(self, variant: Variant, downlink: Downlink, extent: Extent) -> EncodedModel:
        version = variant.version
        try:
            made = await self.in_encoder(self._encode_difference, self.open(version), variant, extent)
        except EncodeError as error:
            log.warning("model sent whole", version=version, recipe=str(variant.recipe), reason=str(error))
            made = None
        whole_bytes = self._whole_bytes.get((downlink.whole, extent.name))
        if made is not None and (whole_bytes is None or made.manifest.size_bytes <= _SLACK * whole_bytes):
            return made
        if made is not None:
            await asyncio.to_thread(self._delta_bases.drop, (version, made.manifest.sha256, extent.name))
        return await self._whole(version, downlink, extent)

    def _encode_difference(self, model: ModelFile, variant: Variant, extent: Extent) -> EncodedModel | None:
        """None where the base is not there any more, or of another layout."""
        version, held = variant.version, variant.base
        assert held is not None
        _check(model)
        with self._delta_bases.reading((*held, extent.name)) as base:
            if base is None or base.layout != extent.layout(model.layout):
                return None
            rng = np.random.default_rng([version, *held[1]])
            with self._payload_file(version) as file:
                recipe = variant.recipe.for_layout(model.layout)
                source = PayloadSource(version, base.layout, extent.of(model), ModelTensors(base), extent.name)
                manifest = self._delta_bases.write(source, recipe, file, rng)
        crc = self._delta_bases.crc32((version, manifest.sha256, extent.name))
        payload = _open_payload(Path(file.name), 0, manifest.size_bytes)
        return EncodedModel(version, manifest, payload, held[0], crc)

    def _encode(self, model: ModelFile, variant: Variant, extent: Extent) -> EncodedModel:
        version, recipe = variant.version, variant.recipe
        if (
            extent.kept_channels is None
            and not variant.kept
            and _is_raw(recipe, model.layout)
            and model.tensors_sha256 is not None
        ):
            _check(model)
            manifest = _raw_manifest(model)
            return EncodedModel(
                version, manifest, _open_payload(model.path, model.tensors_start, manifest.size_bytes)
            )
        _check(model)
        with self._payload_file(version) as file:
            named = recipe.for_layout(model.layout)
            source = PayloadSource(version, extent.layout(model.layout), extent.of(model), None, extent.name)
            manifest = _write(source, named, file, self._delta_bases if variant.kept else None)
        if variant.kept:
            self._whole_bytes[recipe, extent.name] = manifest.size_bytes
        return EncodedModel(version, manifest, _open_payload(Path(file.name), 0, manifest.size_bytes))

    @contextmanager
    def _payload_file(self, version: int) -> Iterator[BinaryIO]:
        """A new file for a payload; it is removed where writing it fails. Raises `StorageError`."""
        path = self._encoded_folder / f"{version:06d}-{next(self._numbers)}.payload"
        try:
            with path.open("wb") as file:
                yield file
        except OSError as error:
            path.unlink(missing_ok=True)
            raise StorageError(f"cannot store the encoded model: {error.strerror}") from error

    async def prune(self, keep: frozenset[int], models: frozenset[int] = frozenset()) -> None:
        """Remove all of every version that is not in `keep`; the models themselves stay if in `models`."""
        gone = [variant for variant in self._made if variant.version not in keep]
        pulled = {variant.version for variant in gone if self._let_go(variant)}
        await asyncio.to_thread(self._remove_files, keep, models, pulled)

    def _let_go(self, variant: Variant) -> bool:
        """Forget a payload; whether somebody is still pulling it."""
        made = self._made.pop(variant)
        self._looked_at.pop(variant, None)
        if not made.done():
            return True
        if made.cancelled() or made.exception() is not None:
            return False
        payload = made.result().payload
        self.chunk_cache.forget(payload)
        pulling = weakref.ref(payload)
        del made, payload
        return pulling() is not None

    def _remove_files(self, keep: frozenset[int], models: frozenset[int], pulled: set[int]) -> None:
        with storage_errors("an old model", "remove"):
            # Those who have waited for `keep` hold the version before it.
            self._delta_bases.prune(keep | {min(keep) - 1})
            for folder in (self._models, self._optimizer_states, self._encoded_folder):
                for path in folder.iterdir():
                    number = _VERSION.match(path.name)
                    if number is None or int(number[1]) in keep:
                        continue
                    if folder == self._models and int(number[1]) in models:
                        continue
                    if folder == self._models and int(number[1]) not in pulled:
                        self.recycled.keep(path)
                    else:
                        path.unlink(missing_ok=True)


def _open(path: Path) -> ModelFile:
    try:
        return ModelFile.open(path)
    except UsageError as error:
        raise StorageError(str(error)) from error


def _check(model: ModelFile) -> None:
    """Nothing is made of a file that has changed. Raises `StorageError`."""
    if not model.as_written:
        raise StorageError(
            f"{model.path} is corrupt: it has changed on the disk since it was written; restore it from a copy"
        )


def _write(source: PayloadSource, recipe: Recipe, file: BinaryIO, delta_bases: DeltaBases | None) -> Manifest:
    """A model that the recipe cannot hold, such as 70000 in float16, travels as it is: the run goes on."""

    def write(recipe: Recipe) -> Manifest:
        rng = np.random.default_rng(source.version)
        if delta_bases is None:
            return write_payload(source.model, recipe, file, rng, source.layout)
        return delta_bases.write(source, recipe, file, rng)

    try:
        return write(recipe)
    except EncodeError as error:
        log.warning("model sent as it is", version=source.version, recipe=str(recipe), reason=str(error))
    file.seek(0)
    file.truncate()
    return write(Recipe(Raw(), compression=recipe.compression))


class _CutTensors(Mapping[str, Array]):
    """A sub-model's tensors by name, each cut out when it is asked for."""

    def __init__(self, tensors: Mapping[str, Array], kept_channels: KeptChannels) -> None:
        self._tensors = tensors
        self._selection = kept_channels

    def __getitem__(self, name: str) -> Array:
        tensor = self._tensors[name]
        return self._selection.coverage(name, tensor.shape).take(tensor)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _is_raw(recipe: Recipe, layout: Layout) -> bool:
    named = recipe.for_layout(layout)
    return recipe.compression.method == "none" and all(named.for_tensor(spec) == Raw() for spec in layout)


def _raw_manifest(model: ModelFile) -> Manifest:
    """Of the tensors in the model file itself, which are their own raw payload."""
    entries = tuple(TensorEntry(spec, Raw(), spec.nbytes) for spec in model.layout)
    size_bytes = sum(spec.nbytes for spec in model.layout)
    assert model.tensors_sha256 is not None
    return Manifest(entries, "none", (), size_bytes, model.tensors_sha256)


def _open_payload(path: Path, start: int, size_bytes: int) -> PayloadFile:
    """The file stays open, and so readable after it has been pruned. It has just been written, or checked."""
    with storage_errors(path, "read"):
        file = path.open("rb", buffering=0)
    payload = PayloadFile(file, start, size_bytes)
    return replace(payload, crc32=payload.computed_crc32())
