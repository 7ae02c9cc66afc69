"""The model version that the device holds, and the download of the next one.

    model/00000003/    the held version: model.pb, payload (fedgrpc.worker.held_model)
    model/partial/     a download that can resume: a `ResumableFile` in two files
        received           the `StoredModel` that it becomes, and how many bytes of the payload are committed
        payload            these bytes, and behind them what a former use of the file has left

The rule: a folder with a number is complete and its payload has matched its digest. Weights that came as a
difference are stored whole, so that the held version never depends on another. Their record has a CRC-32, and
their digest is computed when somebody pulls them. Nothing here is synced to the disk: what a power cut takes away
can be pulled again, and what it leaves is checked at the next start.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Final, NoReturn

import structlog
from google.protobuf.message import DecodeError

from fedgrpc.codec.layout import TensorRole
from fedgrpc.codec.manifest import Limits, Manifest
from fedgrpc.codec.payload import PayloadReader, buffer_reader, file_reader
from fedgrpc.errors import CodecError, CorruptError, LayoutError, StorageError, WrongOffset
from fedgrpc.protocol.tensors import manifest_from_proto, manifest_to_proto
from fedgrpc.storage.files import (
    UNFINISHED,
    RecycledFiles,
    empty_folder,
    is_gone,
    make_private,
    remove_folder,
    storage_errors,
    sweep,
)
from fedgrpc.storage.resumable import ResumableFile, committed_bytes, read_header
from fedgrpc.v1 import aggregator_pb2, worker_pb2
from fedgrpc.worker.delta import write_sum
from fedgrpc.worker.held_model import PAYLOAD, RECORD, HeldModel, Source

_RECEIVED: Final = "received"

log = structlog.get_logger()


def received_bytes(folder: Path) -> int:
    """Return how much of a partial download's payload is there. Raises OSError."""
    return committed_bytes(folder / PAYLOAD, folder / _RECEIVED)


class PartialModel(ResumableFile):
    """A download in `folder`, continued where it stands or begun. One task at a time uses it."""

    def __init__(
        self, folder: Path, record: worker_pb2.StoredModel, manifest: Manifest, recycled: RecycledFiles
    ) -> None:
        """`manifest` is that of `record`. Raises OSError."""
        self.folder = folder
        self.record = record
        self.manifest = manifest
        super().__init__(
            folder / PAYLOAD,
            record.SerializeToString(deterministic=True),
            manifest.size_bytes,
            manifest.digest,
            recycled,
            head_path=folder / _RECEIVED,
            # What a power cut takes away can be pulled again.
            durable=False,
            what="the model",
        )

    def finish(self, with_identity: bool = False) -> None:
        """Leave the whole payload and its record. Raises CorruptError unless it matches its digest.

        `with_identity`: and the SHA-256 of its version, which came with it.
        """
        if not self.complete:
            raise CorruptError(f"{self.size_bytes} of the model's {self.expected_bytes} bytes came")
        if not self.matches_digest:
            raise CorruptError("the model's digest is not the one its manifest declares")
        with storage_errors(self.folder):
            if with_identity and self.sha256() != self.record.header.sha256:
                raise CorruptError("the model's SHA-256 is not that of the version")
            os.truncate(self.path, self.size_bytes)
            _write_record(self.folder, self.record)
            (self.folder / _RECEIVED).unlink()


def _write_record(folder: Path, record: worker_pb2.StoredModel) -> None:
    (folder / RECORD).write_bytes(record.SerializeToString(deterministic=True))


class ModelFolder:
    """The held version and, if it `has_partial`, the partial download in one folder. One owner."""

    def __init__(self, folder: Path, with_identity: bool = False) -> None:
        """`with_identity`: a download must match the SHA-256 of its version, too. Raises `StorageError`."""
        self._folder = folder
        self._with_identity = with_identity
        self._limits = Limits()
        self._partial = folder / "partial"
        with storage_errors(folder):
            make_private(folder)
            sweep(folder)
            # Two sets of recycled files, since a difference is small and whole weights are large.
            self._recycled = RecycledFiles(folder / "recycled", 1)
            self._recycled_differences = RecycledFiles(folder / "recycled-differences", 1)
            self.has_partial = self._partial.exists()
        self.held = self._load_held()

    def limit(self, most_bytes: int | None) -> None:
        """Take no version of more than `most_bytes`, decoded; None: the usual limit. A larger held one is dropped.

        Raises `StorageError`.
        """
        usual = Limits()
        most_bytes = usual.max_decoded_bytes if most_bytes is None else most_bytes
        self._limits = replace(usual, max_decoded_bytes=min(usual.max_decoded_bytes, most_bytes))
        if self.held is not None and sum(spec.nbytes for spec in self.held.manifest.layout) > most_bytes:
            # Without it, the version comes whole and is refused, as on a device that has never held it.
            with storage_errors(self._folder):
                remove_folder(self.held.folder)
            self.held = None
            self.drop_partial()

    def forget_other_runs(self, run: str) -> None:
        """Drop a model of another run: version numbers mean nothing across runs."""
        if self.held is not None and self.held.source.run != run:
            with storage_errors(self._folder):
                remove_folder(self.held.folder)
            self.held = None

    def partial_size_bytes(self, source: Source) -> int:
        """Return the bytes of an interrupted download of `source`; 0 when there is none."""
        try:
            text, _ = read_header(self._partial / _RECEIVED)
            if Source.of(worker_pb2.StoredModel.FromString(text)) == source:
                return received_bytes(self._partial)
        except OSError as error:
            if not is_gone(error):
                raise StorageError(f"cannot read {self._partial}: {error.strerror}") from error
        except (CorruptError, DecodeError):
            pass
        return 0

    def drop_partial(self) -> None:
        """Remove the partial download, so that the next one starts at its first byte."""
        with storage_errors(self._partial):
            if self._partial.exists():
                remove_folder(self._partial)
        self.has_partial = False

    def base_for(self, source: Source) -> HeldModel | None:
        """Return the held model where a difference to it can give `source`, or it is `source` itself."""
        held = self.held
        # A difference needs the same coordinates on both sides: that of another sub-model means nothing.
        fits = held is not None and held.source.sub_model == source.sub_model and held.version <= source.version
        return held if fits else None

    def open_partial(self, source: Source, header: aggregator_pb2.ModelHeader, offset: int) -> PartialModel:
        """Open the download for a stream that starts at `offset`.

        Raises:
            WrongOffset: the bytes kept are not of this stream's payload.
            LayoutError, TooLargeError: the header's manifest is refused.
        """
        manifest = manifest_from_proto(header.manifest, self._limits)
        self._check_layout(source, header, manifest)
        record = worker_pb2.StoredModel(run_id=source.run, sub_model=source.sub_model, header=header)
        with storage_errors(self._partial):
            if not offset:
                self.drop_partial()
            self._partial.mkdir(parents=True, exist_ok=True)
            self.has_partial = True
            # A difference is small and whole weights are large: each is written over files of its own size.
            recycled = self._recycled_differences if header.base_version else self._recycled
            partial = PartialModel(self._partial, record, manifest, recycled)
        if partial.size_bytes != offset:
            partial.close()
            raise WrongOffset(f"{partial.size_bytes} bytes of this payload are kept, not {offset}")
        return partial

    def _check_layout(self, source: Source, header: aggregator_pb2.ModelHeader, manifest: Manifest) -> None:
        """Raise `LayoutError` unless the version has the tensors of the held one, which fits this device.

        A difference may leave out tensors that are no parameters.
        """
        if header.version != source.version:
            raise LayoutError(f"model version {header.version} came in place of version {source.version}")
        held = self.held
        if held is None or (held.source.run, held.source.sub_model) != (source.run, source.sub_model):
            return
        given, known = set(manifest.layout), set(held.manifest.layout)
        due = known
        if header.base_version:
            due = {spec for spec in known if spec.role is TensorRole.PARAMETER}
        if not due <= given <= known:
            raise LayoutError(f"version {source.version} has not the tensors of version {held.version}")

    def finish(self, partial: PartialModel) -> HeldModel:
        """Verify the download and make it the held version. Slow: run it in a thread.

        Raises:
            CorruptError: it is not whole or does not match what was declared; the partial download is gone.
            LayoutError: it is a difference to a version that is not held.
        """
        try:
            partial.finish(self._with_identity)
        except CorruptError:
            self.drop_partial()
            raise
        with storage_errors(self._folder):
            folder, record, manifest = self._partial, partial.record, partial.manifest
            if record.header.base_version:
                folder, record, manifest = self._add_to_held(partial)
            number = max((int(path.name) for path in self._numbered()), default=0) + 1
            final = folder.rename(self._folder / f"{number:08}")
            self.has_partial = False
            old, self.held = self.held, HeldModel(final, record, manifest)
            if old is not None:
                # Whoever still reads the old payload would see the bytes of the next one in it.
                if not old.in_use:
                    self._recycled.keep(old.folder / PAYLOAD)
                remove_folder(old.folder)
        return self.held

    def _add_to_held(self, partial: PartialModel) -> tuple[Path, worker_pb2.StoredModel, Manifest]:
        """Add the difference in the partial download to the held model. Return folder and record of the sum."""
        base, header = self.held, partial.record.header
        if base is None or base.version != header.base_version:
            self.drop_partial()
            raise LayoutError(f"the model came as a difference to version {header.base_version}, not held")
        # The CRC of a sum with damaged bytes would be right for ever after.
        self.check_held()
        folder = empty_folder(self._folder / (UNFINISHED + "sum"))
        with partial.path.open("rb") as file:
            difference = PayloadReader(partial.manifest, file_reader(file.fileno()), self._limits)
            held = PayloadReader(base.manifest, buffer_reader(base.mapped().data))
            with open(self._recycled.create(folder / PAYLOAD), "wb") as payload:
                manifest, crc = write_sum(held, difference, payload)
                # The file may be a recycled one that was longer.
                payload.truncate()
        if header.HasField("held_crc32") and header.held_crc32 != crc:
            self._drop_held("what it becomes is not what the aggregator takes it for")
        record = worker_pb2.StoredModel(
            run_id=partial.record.run_id,
            sub_model=partial.record.sub_model,
            header=aggregator_pb2.ModelHeader(version=header.version, manifest=manifest_to_proto(manifest)),
            origin_digest=partial.manifest.digest,
            crc32=crc,
        )
        _write_record(folder, record)
        self._recycled_differences.keep(partial.path)
        self.drop_partial()
        return folder, record, manifest

    def check_held(self) -> None:
        """Raise CorruptError if the held model has changed on the disk. It is dropped then, to be pulled whole."""
        if self.held is None:
            return
        if not self.held.folder.exists():
            self._drop_held("its folder is gone")
        try:
            self.held.check()
        except CorruptError as error:
            self._drop_held(str(error))

    def _drop_held(self, why: str) -> NoReturn:
        """Drop the held model and the partial download, which may be a difference to it. Raises CorruptError."""
        assert self.held is not None
        log.warning("held model dropped", folder=str(self.held.folder), reason=why)
        held, self.held = self.held, None
        with storage_errors(self._folder):
            if held.folder.exists():
                remove_folder(held.folder)
        self.drop_partial()
        raise CorruptError(f"the held model version {held.version} has changed on the disk: {why}")

    def _numbered(self) -> list[Path]:
        return sorted(path for path in self._folder.glob("*") if path.name.isdigit())

    def _load_held(self) -> HeldModel | None:
        """Return the newest complete version. Remove older ones, left by a crash, and damaged ones.

        A version that cannot be read now stays for the next start. This process pulls it again.
        """
        held: HeldModel | None = None
        for folder in reversed(self._numbered()):
            if held is None:
                try:
                    whole = HeldModel.load(folder)
                    whole.check()
                    held = whole
                    continue
                except (OSError, DecodeError, CodecError, StorageError) as error:
                    if isinstance(error, StorageError) or (isinstance(error, OSError) and not is_gone(error)):
                        log.warning("held model cannot be read now", folder=str(folder), reason=str(error))
                        return None
                    log.warning("held model dropped", folder=str(folder), reason=str(error))
            remove_folder(folder)
        return held
