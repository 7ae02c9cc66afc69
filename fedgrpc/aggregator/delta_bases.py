"""Delta bases: model versions as devices have them after a lossy payload. The next difference is taken to these.

delta-bases/000007-DIGEST.safetensors               version 7 as a device has it after the payload of this digest
delta-bases/000007-DIGEST-prefix:0.5.safetensors    a sub-model of it, likewise

The rule: a difference is taken to what its receivers hold, not to the version itself, and what they hold after it
is kept as the next base. So what one payload loses travels with the next, and errors never add up (Tang et al.,
arXiv 1905.05957). Nothing is synced to the disk: a base that a power cut has damaged is forgotten, and the devices
that hold it get a whole model.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fedgrpc.aio import BackgroundThread
from fedgrpc.codec.difference import add_difference
from fedgrpc.codec.layout import Array, Layout
from fedgrpc.codec.manifest import Manifest
from fedgrpc.codec.payload import PayloadWriter
from fedgrpc.codec.recipe import Recipe
from fedgrpc.errors import StorageError, UsageError
from fedgrpc.storage.files import RecycledFiles, is_gone, make_private, storage_errors
from fedgrpc.storage.model_file import ModelFile, ModelWriter

_NAME = re.compile(r"(\d+)-([0-9a-f]{32})(?:-([a-z]+:[0-9.e-]+(?::[a-z]+=[0-9]+)*))?\.safetensors")

# What a device claims to hold: a version, and the digest of the payload that gave it to the device.
Held = tuple[int, bytes]
# The same with the name of the sub-model ("": the whole model).
Key = tuple[int, bytes, str]


@dataclass(frozen=True)
class PayloadSource:
    """Tensors to send: those of `model`, or their difference to `base`; both have that layout.

    `model` is a version, or the sub-model of that name.
    """

    version: int
    layout: Layout
    model: Mapping[str, Array]
    base: Mapping[str, Array] | None = None
    sub_model_name: str = ""


class DeltaBases:
    """The delta bases in one folder. Thread-safe; everything but `knows` blocks."""

    def __init__(self, folder: Path) -> None:
        """Take up what a former process has left. Raises OSError."""
        make_private(folder)
        self._folder = folder
        self._recycled = RecycledFiles(folder / "recycled", 1)
        self._lock = threading.Lock()
        self._paths: dict[Key, Path] = {}
        self._read: list[Key] = []
        # Kept over a restart, since devices hold on to them. Files without such a name were never finished.
        for path in folder.iterdir():
            if found := _NAME.fullmatch(path.name):
                self._paths[int(found[1]), bytes.fromhex(found[2]), found[3] or ""] = path
            elif path.is_file():
                path.unlink()

    def knows(self, key: Key) -> bool:
        """Return whether there may be such a base; only `open` looks at it."""
        # Without the lock: the event loop asks, and one lookup in a dictionary is atomic.
        return key in self._paths

    def open(self, key: Key) -> ModelFile | None:
        """Open a base; None where it is unknown, damaged or cannot be read now. It is read through each time."""
        path = self._paths.get(key)
        if path is None:
            return None
        try:
            base = ModelFile.open(path)
            damaged = not base.as_written
        except StorageError:
            # Not read, so not known to be damaged: it may be there again later.
            return None
        except UsageError as error:
            if isinstance(error.__cause__, OSError) and not is_gone(error.__cause__):
                return None
            damaged = True
        if damaged:
            self.forget(key)
            return None
        return base

    def crc32(self, key: Key) -> int | None:
        """Return the CRC-32 of a base's tensors as they were written; None where it is not known."""
        path = self._paths.get(key)
        try:
            return None if path is None else ModelFile.open(path).sums.crc32
        except UsageError:
            return None

    @contextmanager
    def reading(self, key: Key) -> Iterator[ModelFile | None]:
        """Open a base as `open` does; while the block runs its file stays as it is, whatever is pruned."""
        # A list and not a set: two encoders may read the same base, and the first to end must not free it.
        with self._lock:
            self._read.append(key)
        try:
            yield self.open(key)
        finally:
            with self._lock:
                self._read.remove(key)

    def write(self, source: PayloadSource, recipe: Recipe, out: BinaryIO, rng: np.random.Generator) -> Manifest:
        """Write the payload of `source` to `out`, and keep what its receivers then hold as a delta base.

        Raises `EncodeError` and `StorageError`; nothing is kept then.
        """
        # The key has the digest of the payload, which is known once it is written. Each encoder has its own name.
        unnamed = self._folder / f"{source.version:06d}-{threading.get_ident()}.safetensors"
        payload = PayloadWriter(out, recipe.compression)
        with (
            # Not synced, see above: to sync a model for each payload would take longer than to send it whole.
            ModelWriter(unnamed, source.layout, self._recycled, durable=False) as base,
            # Writing both files takes about as long as encoding: beside it, it costs nothing.
            BackgroundThread[None]("delta-bases") as writing,
        ):
            add_difference(
                payload, source.model, source.base, source.layout, recipe, rng, base.add, writing.submit
            )
            # All tensors have to be in the base before it is closed: the thread may be behind.
            writing.wait()
            manifest = payload.finish()
            base.finish()
        self._keep(unnamed, (source.version, manifest.digest, source.sub_model_name))
        return manifest

    def _keep(self, unnamed: Path, key: Key) -> None:
        version, digest, name = key
        path = self._folder / f"{version:06d}-{digest.hex()}{'-' + name if name else ''}.safetensors"
        with storage_errors("a delta base", "store"):
            unnamed.replace(path)
        # Known only under its final name: what `knows` says can be opened.
        with self._lock:
            self._paths[key] = path

    def prune(self, keep: frozenset[int]) -> None:
        """Remove the bases of versions that are not in `keep`, but for those being read. Raises OSError."""
        with self._lock:
            gone = [key for key in self._paths if key[0] not in keep and key not in self._read]
            paths = [self._paths.pop(key) for key in gone]
        # Outside the lock: a slow disk must not hold up who only asks what is known.
        for path in paths:
            self._recycled.keep(path)

    def forget(self, key: Key) -> None:
        """Remove a base that is damaged, or that no device will hold."""
        with self._lock:
            path = self._paths.pop(key, None)
        if path is not None:
            with suppress(OSError):
                path.unlink(missing_ok=True)
