"""A run in the data folder of an aggregator, which need not run: its versions, tags and model files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedgrpc.errors import UsageError
from fedgrpc.protocol.records import version_to_proto
from fedgrpc.rounds.version import Measure
from fedgrpc.runs.keeping import resolve
from fedgrpc.runs.versions import Versions
from fedgrpc.storage.database import DATABASE
from fedgrpc.storage.files import storage_errors
from fedgrpc.storage.model_file import ModelFile, write_model
from fedgrpc.storage.model_records import MODEL_RECORDS, ModelRecords
from fedgrpc.storage.run_store import RunStore
from fedgrpc.v1 import models_pb2 as pb

MODELS: Final = "models"


@dataclass(frozen=True)
class StoredRun:
    """Versions of a run, as its folder records them."""

    folder: Path
    id: str
    name: str
    learning_task: str
    ended: bool
    known: Versions
    tags: dict[str, int]

    @classmethod
    def read(cls, folder: Path) -> StoredRun:
        """Return the run of a folder. Raises `StorageError`."""
        with closing(RunStore(folder / DATABASE, read_only=True)) as store:
            run, settings = store.run(), store.settings()
            assert run is not None
            versions = Versions(_measures(settings), bool(settings.get("evaluators", "()") != "()"))
            with storage_errors(folder, "read"):
                there = [int(path.stem) for path in (folder / MODELS).glob("*.safetensors") if path.stem.isdigit()]
            for version in store.versions(sorted(there)):
                versions.add(version)
        tags = {}
        if (folder / MODEL_RECORDS).exists():
            with closing(ModelRecords(folder / MODEL_RECORDS, read_only=True)) as records:
                tags = records.tags()
        return cls(
            *(folder, run.id, run.name, settings.get("learning_task", "")),
            *(run.phase.final, versions, tags),
        )

    def _record(self, number: int) -> pb.VersionRecord:
        known, best, last = self.known.get(number), self.known.best, self.known.last
        assert known is not None
        path = self.path(number)
        record = pb.VersionRecord(
            version=version_to_proto(known),
            size_bytes=sum(spec.nbytes for spec in ModelFile.open(path).layout),
            tags=sorted(tag for tag, tagged in self.tags.items() if tagged == number),
            best=best is not None and best.version == number,
            latest=last is not None and last.version == number,
        )
        record.written_at.FromNanoseconds(path.stat().st_mtime_ns)
        return record

    def path(self, number: int) -> Path:
        """Return the file of a version."""
        return self.folder / MODELS / f"{number:06d}.safetensors"

    def listed(self) -> pb.ListVersionsResponse:
        """Return all versions."""
        about = {"run": self.name, "run_id": self.id, "learning_task": self.learning_task}
        return pb.ListVersionsResponse(**about, versions=map(self._record, self.known))

    def version(self, name: str) -> pb.GetVersionResponse:
        """Return a version by its number, "latest", "best", "final" or a tag. Raises `NotFound`."""
        number = resolve(name, self.known, self.tags, self.ended)
        about = {"run": self.name, "run_id": self.id, "learning_task": self.learning_task}
        return pb.GetVersionResponse(**about, version=self._record(number))

    def copy(self, found: pb.GetVersionResponse, path: Path) -> None:
        """Write a version to a file, with what is known of it as metadata. Raises `UsageError`, `StorageError`."""
        model = ModelFile.open(self.path(found.version.version.version))
        if not model.as_written:
            raise UsageError(f"{model.path} is corrupt: it has changed on the disk since it was written")
        tensors = (model.tensor(index) for index in range(len(model.layout)))
        write_model(path, model.layout, tensors, metadata(found))

    def save_tag(self, tag: str, number: int | None) -> None:
        """Give a version a tag; None: take it away. Raises `StorageError`."""
        with closing(ModelRecords(self.folder / MODEL_RECORDS)) as records:
            records.save_tag(tag, number)


def _measures(settings: Mapping[str, str]) -> tuple[Measure, ...]:
    """Return the run's own measure, by which the aggregator compares its versions."""
    name = settings.get("target.name")
    return () if name is None else (Measure(name, settings.get("target.at_least") != "False"),)


def metadata(found: pb.GetVersionResponse) -> dict[str, str]:
    """Return what is known of a version, as text for the header of its file."""
    record, version = found.version, found.version.version
    scores = {**version.metrics, **version.evaluator_metrics}
    return {
        "run": found.run,
        "run_id": found.run_id,
        "version": str(version.version),
        "trained_rounds": str(version.trained_rounds),
        "task": found.learning_task,
        "tags": ",".join(record.tags),
        "scores": json.dumps(dict(sorted(scores.items()))),
        "digest": version.sha256.hex(),
        "written_at": record.written_at.ToJsonString(),
    }
