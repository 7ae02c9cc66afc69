"""Encoding of one payload of a version: the whole model, a sub-model, or a difference to a delta base.

The rule: a payload is a function of its `Variant`. Every process makes the same bytes of it, and a download that a
restart cut off resumes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
import structlog

from fedgrpc.aggregation.partial_update import sub_layout
from fedgrpc.aggregator.chunk_cache import PayloadFile
from fedgrpc.aggregator.delta_bases import DeltaBases, Held, PayloadSource
from fedgrpc.aggregator.model_store import ModelStore, check_as_written
from fedgrpc.aggregator.negotiation import reduced_recipe
from fedgrpc.codec.layout import Array, Layout
from fedgrpc.codec.manifest import Manifest, TensorEntry
from fedgrpc.codec.payload import write_payload
from fedgrpc.codec.raw import Raw
from fedgrpc.codec.recipe import Recipe
from fedgrpc.errors import EncodeError, FedgrpcError, StorageError
from fedgrpc.protocol.tensors import manifest_to_proto
from fedgrpc.runs.task_context import Downlink
from fedgrpc.storage.files import storage_errors
from fedgrpc.storage.model_file import ModelFile, ModelTensors
from fedgrpc.submodels.channels import KeptChannels, SubModel
from fedgrpc.submodels.reduction import ReducedTensors, Reduction
from fedgrpc.v1.aggregator_pb2 import ModelHeader, PullModelResponse

log = structlog.get_logger()

# A difference that is hardly larger than the model is worth its bytes: it loses far less.
_SLACK: Final = 1.05

# The channels of a sub-model of a version; None: all of them. Blocks.
FindChannels = Callable[[SubModel, int], KeptChannels | None]


@dataclass(frozen=True)
class Pull:
    """Request of one worker: a version, or a sub-model of it, as agreed on, given what the worker holds of it."""

    version: int
    downlink: Downlink
    held: Held | None = None
    sub_model: SubModel = field(default_factory=SubModel)
    reduction: Reduction = field(default_factory=Reduction)


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
    reduction: Reduction = field(default_factory=Reduction)
    # Sub-models of one name have the same channels.
    sub_model: SubModel = field(default_factory=SubModel, compare=False)

    @classmethod
    def whole_of(cls, pull: Pull) -> Variant:
        """Return the payload without a difference."""
        # No worker takes a difference between sub-models whose channels differ.
        # Nor between reduced models: each keeps other weights, and the kept ones alone take fewer bytes.
        kept = pull.downlink.difference is not None and not pull.sub_model.moves and pull.reduction.nothing
        name, recipe = pull.sub_model.name, pull.downlink.whole
        return cls(pull.version, recipe, name, kept=kept, reduction=pull.reduction, sub_model=pull.sub_model)


@dataclass(frozen=True)
class EncodedModel:
    """Version in one recipe, on disk. `base_version` above 0: its difference to a delta base of that version.

    `held_crc32` is of what its receivers then hold. `payload` None: they hold all of it, and nothing is sent.
    `sha256`: of the payload of a whole version that travels raw; b"": another one.
    """

    version: int
    manifest: Manifest
    payload: PayloadFile | None
    base_version: int = 0
    held_crc32: int | None = None
    sha256: bytes = b""

    @classmethod
    def unchanged(cls, version: int) -> EncodedModel:
        """Return the answer to a worker that holds the version."""
        return cls(version, Manifest.of_nothing(), None, version)

    @cached_property
    def header(self) -> bytes:
        """First message of its stream, serialized once for all who pull it."""
        manifest = manifest_to_proto(self.manifest)
        header = ModelHeader(
            version=self.version,
            manifest=manifest,
            base_version=self.base_version,
            held_crc32=self.held_crc32,
            sha256=self.sha256,
        )
        return PullModelResponse(header=header).SerializeToString()


class PayloadEncoder:
    """Writes payloads into `folder`, and what they make their receivers hold into `bases`. Its methods block."""

    def __init__(self, folder: Path, models: ModelStore, bases: DeltaBases, find_channels: FindChannels) -> None:
        self._folder = folder
        self._models = models
        self._bases = bases
        self._find_channels = find_channels
        # Part of each file's name: while an old payload of a version is read a new one may be written.
        self._numbers = count(1)

    def encode(self, variant: Variant) -> EncodedModel | None:
        """Return a new payload; None for a difference that is worth nothing, or whose base is gone.

        Raises `NotFound`, also for a sub-model while the channels are not known, and `StorageError`.
        """
        return self._encode(variant) if variant.base is None else self._encode_difference(variant)

    def _encode_difference(self, variant: Variant) -> EncodedModel | None:
        """Encode a difference. None without such a base, or where the whole is smaller."""
        assert variant.base is not None
        model, layout, tensors = self._source(variant)
        with self._bases.reading((*variant.base, variant.sub_model_name)) as base:
            # A base from before a rollback to another model has other tensors.
            if base is None or base.layout != layout:
                return None
            source = PayloadSource(variant.version, layout, tensors, ModelTensors(base), variant.sub_model_name)
            # Seeded by its base: a process that was restarted writes the same bytes, and downloads resume.
            rng = np.random.default_rng([variant.version, *variant.base[1]])
            try:
                with self._payload_file(variant.version) as file:
                    manifest = self._bases.write(source, variant.recipe.for_layout(model.layout), file, rng)
            except EncodeError as error:
                log.warning(
                    "model sent whole", version=variant.version, recipe=str(variant.recipe), reason=str(error)
                )
                return None
        key = (variant.version, manifest.digest, variant.sub_model_name)
        assert variant.whole is not None
        # What the whole takes at most, and not what one took: a process that was restarted knows of none.
        if manifest.size_bytes > _SLACK * most_bytes(variant.whole.for_layout(model.layout), layout):
            self._bases.forget(key)
            Path(file.name).unlink(missing_ok=True)
            return None
        payload = _open_payload(Path(file.name), 0, manifest)
        return EncodedModel(variant.version, manifest, payload, variant.base[0], self._bases.crc32(key))

    def _encode(self, variant: Variant) -> EncodedModel:
        model, layout, tensors = self._source(variant)
        if (
            not variant.kept
            and variant.reduction.nothing
            and layout == model.layout
            and _is_raw(variant.recipe, layout)
            and model.sums.digest
        ):
            # The tensors in the model's file are their own raw payload: no copy, and nothing to encode.
            entries = tuple(TensorEntry(spec, Raw(), spec.nbytes) for spec in layout)
            manifest = Manifest(entries, "none", (), sum(spec.nbytes for spec in layout), model.sums.digest)
            payload = _open_payload(model.path, model.tensors_start, manifest)
            return EncodedModel(variant.version, manifest, payload, sha256=model.sums.sha256 or b"")
        recipe = variant.recipe.for_layout(model.layout)
        # Weights that the device prunes or clusters anyway need not travel.
        if not variant.reduction.nothing:
            reducible = [spec for spec in layout if spec.is_trained and spec.is_float]
            tensors = ReducedTensors(tensors, variant.reduction, {spec.name for spec in reducible})
            recipe = reduced_recipe(recipe, reducible, variant.reduction)
        source = PayloadSource(variant.version, layout, tensors, None, variant.sub_model_name)
        with self._payload_file(variant.version) as file:
            manifest = _write(source, recipe, file, self._bases if variant.kept else None)
        payload = _open_payload(Path(file.name), 0, manifest)
        return EncodedModel(variant.version, manifest, payload)

    def _source(self, variant: Variant) -> tuple[ModelFile, Layout, Mapping[str, Array]]:
        """Return a version's file, with layout and tensors of the sub-model. Raises as `get`."""
        model = self._models.open(variant.version)
        # Read whole before it is encoded: damage would otherwise reach every device under a valid digest.
        check_as_written(model)
        kept_channels = self._find_channels(variant.sub_model, variant.version)
        tensors = ModelTensors(model)
        if kept_channels is None:
            return model, model.layout, tensors
        shapes = sub_layout(model.layout, kept_channels)
        layout = tuple(replace(spec, shape=shapes[spec.name]) for spec in model.layout if spec.name in shapes)
        return model, layout, _CutTensors(tensors, kept_channels)

    @contextmanager
    def _payload_file(self, version: int) -> Iterator[BinaryIO]:
        """Open a new file for a payload; it is removed where writing it fails. Raises `StorageError`."""
        path = self._folder / f"{version:06d}-{next(self._numbers)}.payload"
        try:
            with path.open("wb") as file:
                yield file
        except (OSError, FedgrpcError) as error:
            path.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise StorageError(f"cannot store the encoded model: {error.strerror}") from error
            raise


def _write(source: PayloadSource, recipe: Recipe, file: BinaryIO, bases: DeltaBases | None) -> Manifest:
    """Write a whole model. One that the recipe cannot hold, such as 70000 in float16, travels raw."""

    def write(recipe: Recipe) -> Manifest:
        # Seeded by the version: each process writes the same bytes, and a download resumes after a restart.
        rng = np.random.default_rng(source.version)
        if bases is None:
            return write_payload(source.model, recipe, file, rng, source.layout)
        return bases.write(source, recipe, file, rng)

    try:
        return write(recipe)
    except EncodeError as error:
        log.warning("model sent as it is", version=source.version, recipe=str(recipe), reason=str(error))
    # Some tensors were written before the one that the recipe cannot hold.
    file.seek(0)
    file.truncate()
    return write(Recipe(Raw(), compression=recipe.compression))


class _CutTensors(Mapping[str, Array]):
    """A sub-model's tensors by name, each cut out when it is asked for."""

    def __init__(self, tensors: Mapping[str, Array], kept_channels: KeptChannels) -> None:
        self._tensors = tensors
        self._kept_channels = kept_channels

    def __getitem__(self, name: str) -> Array:
        tensor = self._tensors[name]
        return self._kept_channels.coverage(name, tensor.shape).take(tensor)

    def __iter__(self) -> Iterator[str]:
        return filter(self._kept_channels.has, self._tensors)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def most_bytes(recipe: Recipe, layout: Layout) -> int:
    """Return the most bytes of a model in a recipe, before compression."""
    return sum(recipe.for_tensor(spec).size_bounds(spec)[1] for spec in layout)


def _is_raw(recipe: Recipe, layout: Layout) -> bool:
    named = recipe.for_layout(layout)
    return recipe.compression.method == "none" and all(named.for_tensor(spec) == Raw() for spec in layout)


def _open_payload(path: Path, start: int, manifest: Manifest) -> PayloadFile:
    """Open a payload that has just been written or checked. It stays readable after it has been pruned."""
    with storage_errors(path, "read"):
        file = path.open("rb", buffering=0)
    return PayloadFile(file, start, manifest.size_bytes, manifest.digest)
