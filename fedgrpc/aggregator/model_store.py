"""Model versions on disk, and their encoded forms, each made once and shared by every worker.

models/000007.safetensors       version 7
optimizer/000007.safetensors    what the server optimizer remembers after version 7
encoded/000007-HASH.payload     version 7 in one recipe, or its difference; made anew when it is not there
held/                           what workers hold of it (fedgrpc.aggregator.forms)
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
import structlog

from fedgrpc.aggregation import packed
from fedgrpc.aggregation.channels import Selection, SubModel
from fedgrpc.aggregator.forms import Forms, Source
from fedgrpc.aggregator.frames import FrameCache, PayloadFile
from fedgrpc.aggregator.model_file import ModelFile, ModelTensors
from fedgrpc.codec.layout import Array, Layout
from fedgrpc.codec.manifest import Manifest, TensorEntry
from fedgrpc.codec.payload import write_payload
from fedgrpc.codec.raw import Raw
from fedgrpc.codec.recipe import Recipe
from fedgrpc.errors import EncodeError, Exhausted, FedgrpcError, NotFound, StorageError, UsageError
from fedgrpc.rpc.convert import manifest_to_proto
from fedgrpc.spares import SpareFiles
from fedgrpc.v1.aggregator_pb2 import ModelHeader, PullModelResponse

log = structlog.get_logger()

# What a worker says to hold: a version, and the SHA-256 of the payload that made it.
Held = tuple[int, bytes]

_VERSION = re.compile(r"(\d+)(-|\.safetensors$)")
# Keys of payloads whose receivers are known to hold what they then make differences to.
_HELD = re.compile(r" (held$|to [0-9a-f]{64} or )")

_FRAMES_BYTES = 16 << 20
_SENDING_BYTES = 16 << 20
_MAX_SPARES = 1
# Workers that hold other forms than these few get the whole model, and so hold the same again.
_MAX_DIFFERENCES = 3
# A difference that is hardly larger than the model is worth its bytes: it loses far less.
_SLACK = 1.05


@dataclass(frozen=True)
class Downlink:
    """How models travel to workers: whole, or as a difference to what they hold (None: always whole)."""

    whole: Recipe
    difference: Recipe | None = None


@dataclass(frozen=True)
class Slice:
    """What a sub-model has of a version; the default is all of it."""

    sub_model: SubModel = field(default_factory=SubModel)
    selection: Selection | None = None

    @property
    def name(self) -> str:
        """As it is on the wire; "" is the whole model."""
        return "" if self.sub_model.whole else str(self.sub_model)

    @property
    def mark(self) -> str:
        """What tells its recipes from those of others."""
        return f"|{self.name}" if self.name else ""

    def layout(self, model: Layout) -> Layout:
        """The tensors that it has of a model of that layout."""
        shapes = packed.sub_layout(model, self.selection)
        return tuple(replace(spec, shape=shapes[spec.name]) for spec in model)

    def of(self, model: ModelFile) -> Mapping[str, Array]:
        """Its tensors, each read and cut out when it is asked for."""
        tensors = ModelTensors(model)
        return tensors if self.selection is None else _Sliced(tensors, self.selection)


WHOLE = Slice()


@dataclass(frozen=True)
class EncodedModel:
    """One version in one recipe, on disk; `base_version` above 0: its difference to a form of that version."""

    version: int
    manifest: Manifest
    payload: PayloadFile
    base_version: int = 0

    @cached_property
    def header(self) -> bytes:
        """The first message of its stream, serialized."""
        manifest = manifest_to_proto(self.manifest)
        header = ModelHeader(version=self.version, manifest=manifest, base_version=self.base_version)
        return PullModelResponse(header=header).SerializeToString()


class ModelStore:
    """The versions in a data folder."""

    def __init__(self, data_dir: Path, downlinks: Sequence[Downlink] = ()) -> None:
        """`downlinks`: those of all workers, the usual one first. Raises OSError."""
        self._downlinks = tuple(downlinks) or (Downlink(Recipe(Raw())),)
        self._max_differences = _MAX_DIFFERENCES + len({downlink.difference for downlink in self._downlinks}) - 1
        self._whole_bytes: dict[tuple[Recipe, str], int] = {}
        self._opened: tuple[tuple[int, ...], ModelFile] | None = None
        self._models = data_dir / "models"
        self._memories = data_dir / "optimizer"
        self._encoded = data_dir / "encoded"
        for folder in (self._models, self._memories, self._encoded):
            folder.mkdir(parents=True, exist_ok=True)
        self.spares = SpareFiles(data_dir / "models" / "spare", _MAX_SPARES)
        self._forms = Forms(data_dir / "held")
        for path in self._encoded.iterdir():
            path.unlink(missing_ok=True)
        self._made: dict[tuple[int, str], asyncio.Task[EncodedModel]] = {}
        self.frames = FrameCache(_FRAMES_BYTES, _SENDING_BYTES)

    def path(self, version: int) -> Path:
        """Where `version` is, or will be."""
        return self._models / f"{version:06d}.safetensors"

    def memory_path(self, version: int) -> Path:
        """Where the server optimizer's memory after `version` is, or will be."""
        return self._memories / f"{version:06d}.safetensors"

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

    def open_memory(self, version: int) -> ModelFile | None:
        """The server optimizer's memory after `version`, None where it keeps none."""
        path = self.memory_path(version)
        return _open(path) if path.exists() else None

    def tensors(self, version: int) -> Mapping[str, Array]:
        """The tensors of `version` by name, each read when it is asked for. Raises as `open`."""
        return ModelTensors(self.open(version))

    async def encoded(
        self,
        version: int,
        recipe: Recipe,
        max_recipes: int | None = None,
        its: Slice = WHOLE,
    ) -> EncodedModel:
        """`version`, or a slice of it, in `recipe`; made once for all who ask.

        Raises `NotFound`, `StorageError`, and `Exhausted` when it is kept in `max_recipes` others already.
        """
        key = (version, f"{recipe}{its.mark}")
        if key not in self._made:
            if max_recipes is not None and len(self._foreign(version)) >= max_recipes:
                raise Exhausted(f"model version {version} is already kept in {max_recipes} recipes")
            model = self.open(version)
            encode = asyncio.to_thread(self._encode, model, version, recipe, key[1], its)
            self._made[key] = asyncio.create_task(encode)
        return await self._wait_for(key)

    def _foreign(self, version: int) -> list[str]:
        """What is kept of a version beside that which workers are told to pull."""
        own = {str(downlink.whole) for downlink in self._downlinks}
        texts = (text for made, text in self._made if made == version)
        return [text for text in texts if text not in own and not _HELD.search(text)]

    async def _whole(self, version: int, downlink: Downlink, its: Slice) -> EncodedModel:
        """No difference; what it makes its receivers hold is kept where a difference to that may follow."""
        if downlink.difference is None or its.sub_model.moves:
            return await self.encoded(version, downlink.whole, its=its)
        key = (version, f"{downlink.whole}{its.mark} held")
        if key not in self._made:
            model = self.open(version)
            encode = asyncio.to_thread(self._encode, model, version, downlink.whole, key[1], its, True)
            self._made[key] = asyncio.create_task(encode)
        return await self._wait_for(key)

    async def offered(
        self, version: int, held: Held | None = None, downlink: Downlink | None = None, its: Slice = WHOLE
    ) -> EncodedModel:
        """`version`, or a slice of it, for a worker that holds `held` of it: the difference to that, or no
        difference where that is not known, the difference would be larger, or the slice's channels move.

        Whatever recipe made what is held: the difference is to that. Each is made once for all who ask with the
        same `downlink` (None: the usual one). Raises as `encoded`.
        """
        downlink = downlink or self._downlinks[0]
        recipe = downlink.difference
        if held is None or recipe is None or held[0] >= version or not self.holds(held, its):
            return await self._whole(version, downlink, its)
        key = (version, f"{recipe}{its.mark} to {held[1].hex()} or {downlink.whole}")
        if key not in self._made:
            if self._differences(version, its) >= self._max_differences:
                return await self._whole(version, downlink, its)
            self._made[key] = asyncio.create_task(self._difference(version, downlink, held, key[1], its))
        return await self._wait_for(key)

    def _differences(self, version: int, its: Slice) -> int:
        recipes = (text.partition(" to ") for made, text in self._made if made == version)
        return sum(bool(base) and recipe.partition("|")[2] == its.name for recipe, base, _ in recipes)

    def holds(self, held: Held, its: Slice = WHOLE) -> bool:
        """Whether this is a form that was given here, and a difference to it can be made."""
        return self._forms.knows((*held, its.name))

    async def _wait_for(self, key: tuple[int, str]) -> EncodedModel:
        try:
            return await asyncio.shield(self._made[key])
        except FedgrpcError:
            self._made.pop(key, None)
            raise

    async def _difference(
        self, version: int, downlink: Downlink, held: Held, text: str, its: Slice
    ) -> EncodedModel:
        recipe = downlink.difference
        assert recipe is not None
        try:
            made = await asyncio.to_thread(
                self._encode_difference, self.open(version), version, recipe, held, text, its
            )
        except EncodeError as error:
            log.warning("model sent whole", version=version, recipe=str(recipe), reason=str(error))
            made = None
        whole_bytes = self._whole_bytes.get((downlink.whole, its.name))
        if made is not None and (whole_bytes is None or made.manifest.size_bytes <= _SLACK * whole_bytes):
            return made
        if made is not None:
            await asyncio.to_thread(self._forms.drop, (version, made.manifest.sha256, its.name))
        return await self._whole(version, downlink, its)

    def _encode_difference(
        self, model: ModelFile, version: int, recipe: Recipe, held: Held, text: str, its: Slice
    ) -> EncodedModel | None:
        """None where `held` is not there any more, or of another layout."""
        with self._forms.reading((*held, its.name)) as base:
            if base is None or base.layout != its.layout(model.layout):
                return None
            rng = np.random.default_rng([version, *held[1]])
            with self._payload_file(version, text) as file:
                recipe = recipe.for_layout(model.layout)
                source = Source(version, base.layout, its.of(model), ModelTensors(base), its.name)
                manifest = self._forms.write(source, recipe, file, rng)
        return EncodedModel(version, manifest, _open_payload(Path(file.name), 0), held[0])

    def _encode(
        self,
        model: ModelFile,
        version: int,
        recipe: Recipe,
        key: str,
        its: Slice,
        keep_form: bool = False,
    ) -> EncodedModel:
        if (
            its.selection is None
            and not keep_form
            and _is_raw(recipe, model.layout)
            and model.tensors_sha256 is not None
        ):
            return EncodedModel(version, _raw_manifest(model), _open_payload(model.path, model.tensors_start))
        with self._payload_file(version, key) as file:
            named = recipe.for_layout(model.layout)
            source = Source(version, its.layout(model.layout), its.of(model), None, its.name)
            manifest = _write(source, named, file, self._forms if keep_form else None)
        if keep_form:
            self._whole_bytes[recipe, its.name] = manifest.size_bytes
        return EncodedModel(version, manifest, _open_payload(Path(file.name), 0))

    @contextmanager
    def _payload_file(self, version: int, key: str) -> Iterator[BinaryIO]:
        """A new file for a payload; it is removed where writing it fails. Raises `StorageError`."""
        name = hashlib.sha256(key.encode()).hexdigest()[:16]
        path = self._encoded / f"{version:06d}-{name}.payload"
        try:
            with path.open("wb") as file:
                yield file
        except OSError as error:
            path.unlink(missing_ok=True)
            raise StorageError(f"cannot store the encoded model: {error.strerror}") from error

    async def prune(self, keep: frozenset[int]) -> None:
        """Remove every version that is not in `keep`, in all its forms."""
        pulled = {key[0] for key in list(self._made) if key[0] not in keep and self._let_go(key)}
        await asyncio.to_thread(self._remove_files, keep, pulled)

    def _let_go(self, key: tuple[int, str]) -> bool:
        """Forget an encoded form; whether somebody is still pulling it."""
        made = self._made.pop(key)
        if not made.done():
            return True
        if made.cancelled() or made.exception() is not None:
            return False
        payload = made.result().payload
        self.frames.forget(payload)
        pulling = weakref.ref(payload)
        del made, payload
        return pulling() is not None

    def _remove_files(self, keep: frozenset[int], pulled: set[int]) -> None:
        try:
            # Those who have waited for `keep` hold the version before it.
            self._forms.prune(keep | {min(keep) - 1})
            for folder in (self._models, self._memories, self._encoded):
                for path in folder.iterdir():
                    number = _VERSION.match(path.name)
                    if number is None or int(number[1]) in keep:
                        continue
                    if folder == self._models and int(number[1]) not in pulled:
                        self.spares.keep(path)
                    else:
                        path.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"cannot remove an old model: {error.strerror}") from error


def _open(path: Path) -> ModelFile:
    try:
        return ModelFile.open(path)
    except UsageError as error:
        raise StorageError(str(error)) from error


def _write(source: Source, recipe: Recipe, file: BinaryIO, forms: Forms | None) -> Manifest:
    """A model that the recipe cannot hold, such as 70000 in float16, travels as it is: the run goes on."""

    def write(recipe: Recipe) -> Manifest:
        rng = np.random.default_rng(source.version)
        if forms is None:
            return write_payload(source.model, recipe, file, rng)
        return forms.write(source, recipe, file, rng)

    try:
        return write(recipe)
    except EncodeError as error:
        log.warning("model sent as it is", version=source.version, recipe=str(recipe), reason=str(error))
    file.seek(0)
    file.truncate()
    return write(Recipe(Raw(), compression=recipe.compression))


class _Sliced(Mapping[str, Array]):
    """A sub-model's tensors by name, each cut out when it is asked for."""

    def __init__(self, tensors: Mapping[str, Array], selection: Selection) -> None:
        self._tensors = tensors
        self._selection = selection

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


def _open_payload(path: Path, start: int) -> PayloadFile:
    """The file stays open, and so readable after it has been pruned."""
    try:
        file = path.open("rb", buffering=0)
        return PayloadFile(file, start, os.fstat(file.fileno()).st_size - start)
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
