"""What workers hold: model versions in the forms that lossy payloads give them.

held/000007-SHA256.safetensors               version 7 as it is on a device that has the payload of this SHA-256
held/000007-SHA256-prefix:0.5.safetensors    its slice of that name, likewise

The rule: a difference is taken to what its receivers hold, not to the version itself, and what they hold after it
is kept as the next base. So what one payload loses travels with the next, and errors never add up (Tang et al.,
arXiv 1905.05957). Nothing is synced to the disk: a form that a power cut has damaged is forgotten, and its holders
get a whole model.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fedgrpc.aggregator.model_file import ModelFile, ModelWriter
from fedgrpc.codec.difference import add, subtract
from fedgrpc.codec.layout import Array, layout_of, spec_of
from fedgrpc.codec.manifest import Manifest
from fedgrpc.codec.payload import PayloadWriter, encode_tensor
from fedgrpc.codec.recipe import Recipe
from fedgrpc.errors import StorageError, UsageError
from fedgrpc.spares import SpareFiles

_NAME = re.compile(r"(\d+)-([0-9a-f]{64})(?:-([a-z]+:[0-9.e-]+))?\.safetensors")

# Version, SHA-256 of the payload that made it, and name of the slice ("": the whole model).
Key = tuple[int, bytes, str]


class Forms:
    """The held forms in one folder, by version and SHA-256. Thread-safe; everything but `knows` blocks."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._spares = SpareFiles(folder / "spare", 1)
        self._lock = threading.Lock()
        self._paths: dict[Key, Path] = {}
        self._unchecked: set[Key] = set()
        for path in folder.iterdir():
            if found := _NAME.fullmatch(path.name):
                self._paths[int(found[1]), bytes.fromhex(found[2]), found[3] or ""] = path
            elif path.is_file():
                path.unlink()
        self._unchecked.update(self._paths)

    def knows(self, key: Key) -> bool:
        """Whether this form may be there."""
        return key in self._paths

    def open(self, key: Key) -> ModelFile | None:
        """The form, None where it is not known or was damaged. One from a former process is read through once."""
        path = self._paths.get(key)
        if path is None:
            return None
        try:
            form = ModelFile.open(path)
            if key in self._unchecked and form.computed_sha256() != form.tensors_sha256:
                raise StorageError(f"{path} is damaged")
        except (StorageError, UsageError):
            self._forget(key)
            return None
        self._unchecked.discard(key)
        return form

    def write(
        self,
        version: int,
        model: Mapping[str, Array],
        base: Mapping[str, Array] | None,
        recipe: Recipe,
        out: BinaryIO,
        rng: np.random.Generator,
        slice_name: str = "",
    ) -> Manifest:
        """Write to `out` the payload of `model`, or of its difference to `base`, and keep the form it gives.

        `model` is a version, or what the slice of that name has of it. Raises `EncodeError` and `StorageError`;
        nothing is kept then.
        """
        layout = layout_of(model)
        payload = PayloadWriter(out, recipe.compression)
        unnamed = self._folder / f"{version:06d}-{threading.get_ident()}.safetensors"
        with (
            ModelWriter(unnamed, layout, self._spares, durable=False) as form,
            ThreadPoolExecutor(1, thread_name_prefix="forms") as thread,
        ):
            writing: Future[None] | None = None
            for name, values in model.items():
                spec = spec_of(name, values)
                held = None if base is None else base[name]
                wanted = values if held is None else subtract(values, held)
                encoding, data = encode_tensor(spec, wanted, recipe, rng)
                payload.add(spec, encoding, data)
                arrives = encoding.decode(memoryview(data).toreadonly(), spec)
                if writing is not None:
                    writing.result()
                # It is hashed and written while the next tensor is encoded.
                writing = thread.submit(form.add, arrives if held is None else add(held, arrives))
            manifest = payload.finish()
            if writing is not None:
                writing.result()
            form.finish()
        self._keep(unnamed, (version, manifest.sha256, slice_name))
        return manifest

    def _keep(self, unnamed: Path, key: Key) -> None:
        version, sha256, name = key
        path = self._folder / f"{version:06d}-{sha256.hex()}{'-' + name if name else ''}.safetensors"
        try:
            unnamed.replace(path)
        except OSError as error:
            raise StorageError(f"cannot store what workers hold: {error.strerror}") from error
        with self._lock:
            self._paths[key] = path
            self._unchecked.discard(key)

    def drop(self, key: Key) -> None:
        """Nobody will hold it."""
        self._forget(key)

    def prune(self, keep: frozenset[int], reuse: bool) -> None:
        """Remove the forms of versions that are not in `keep`; `reuse` their files if nobody reads one now.

        Raises OSError.
        """
        with self._lock:
            gone = [key for key in self._paths if key[0] not in keep]
            paths = [self._paths.pop(key) for key in gone]
            self._unchecked.difference_update(gone)
        for path in paths:
            if reuse:
                self._spares.keep(path)
            else:
                path.unlink(missing_ok=True)

    def _forget(self, key: Key) -> None:
        with self._lock:
            path = self._paths.pop(key, None)
            self._unchecked.discard(key)
        if path is not None:
            with suppress(OSError):
                path.unlink(missing_ok=True)
