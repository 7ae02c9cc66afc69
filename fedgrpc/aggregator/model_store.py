"""Model versions on disk, and their encoded forms, each made once and shared by every worker.

models/000007.safetensors       version 7
optimizer/000007.safetensors    what the server optimizer remembers after version 7
encoded/000007-HASH.payload     version 7 in one recipe; made anew when it is not there
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedgrpc.aggregator.model_file import ModelFile
from fedgrpc.codec.layout import Array
from fedgrpc.codec.manifest import Manifest
from fedgrpc.codec.payload import write_payload
from fedgrpc.codec.recipe import Recipe
from fedgrpc.errors import Exhausted, NotFound, StorageError

_MAX_RECIPES = 8


@dataclass(frozen=True)
class EncodedModel:
    """One version in one recipe, on disk."""

    version: int
    manifest: Manifest
    path: Path


class ModelStore:
    """The versions in a data folder."""

    def __init__(self, data_dir: Path) -> None:
        self._models = data_dir / "models"
        self._memories = data_dir / "optimizer"
        self._encoded = data_dir / "encoded"
        for folder in (self._models, self._memories, self._encoded):
            folder.mkdir(parents=True, exist_ok=True)
        for path in self._encoded.iterdir():
            path.unlink(missing_ok=True)
        self._made: dict[tuple[int, str], asyncio.Task[EncodedModel]] = {}

    def path(self, version: int) -> Path:
        """Where `version` is, or will be."""
        return self._models / f"{version:06d}.safetensors"

    def memory_path(self, version: int) -> Path:
        """Where the server optimizer's memory after `version` is, or will be."""
        return self._memories / f"{version:06d}.safetensors"

    def open(self, version: int) -> ModelFile:
        """Version `version`. Raises `NotFound`."""
        if not self.path(version).exists():
            raise NotFound(f"there is no model version {version} here")
        return ModelFile.open(self.path(version))

    def open_memory(self, version: int) -> ModelFile | None:
        """The server optimizer's memory after `version`, None where it keeps none."""
        path = self.memory_path(version)
        return ModelFile.open(path) if path.exists() else None

    async def encoded(self, version: int, recipe: Recipe) -> EncodedModel:
        """`version` written with `recipe`, made once for all who ask.

        Raises `NotFound`, `StorageError`, and `Exhausted` when too many different recipes are asked for.
        """
        key = (version, str(recipe))
        if key not in self._made:
            if sum(made == version for made, _ in self._made) >= _MAX_RECIPES:
                raise Exhausted(f"model version {version} is already kept in {_MAX_RECIPES} recipes")
            model = self.open(version)
            self._made[key] = asyncio.create_task(asyncio.to_thread(self._encode, model, version, recipe))
        try:
            return await asyncio.shield(self._made[key])
        except StorageError:
            self._made.pop(key, None)
            raise

    def _encode(self, model: ModelFile, version: int, recipe: Recipe) -> EncodedModel:
        name = hashlib.sha256(str(recipe).encode()).hexdigest()[:16]
        path = self._encoded / f"{version:06d}-{name}.payload"
        try:
            with path.open("wb") as file:
                manifest = write_payload(_LazyTensors(model), recipe, file, np.random.default_rng(version))
        except OSError as error:
            path.unlink(missing_ok=True)
            raise StorageError(f"cannot store the encoded model: {error.strerror}") from error
        return EncodedModel(version, manifest, path)

    def prune(self, keep: frozenset[int]) -> None:
        """Remove every version that is not in `keep`, in all its forms."""
        for folder in (self._models, self._memories, self._encoded):
            for path in folder.iterdir():
                if path.suffix != ".part" and int(path.name[:6]) not in keep:
                    path.unlink(missing_ok=True)
        for key in [key for key in self._made if key[0] not in keep]:
            del self._made[key]


class _LazyTensors(Mapping[str, Array]):
    """A model's tensors by name, each read when it is asked for."""

    def __init__(self, model: ModelFile) -> None:
        self._model = model
        self._index = {spec.name: index for index, spec in enumerate(model.layout)}

    def __getitem__(self, name: str) -> Array:
        return self._model.tensor(self._index[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)


def pread(path: Path, offset: int, size: int) -> bytes:
    """`size` bytes of a file. Raises `StorageError` when they are not all there."""
    try:
        with path.open("rb") as file:
            data = os.pread(file.fileno(), size, offset)
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    if len(data) != size:
        raise StorageError(f"{path} is cut short")
    return data
