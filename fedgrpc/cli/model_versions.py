"""Where the versions of a run come from: a running aggregator, or the data folder of one that does not run."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import click

from fedgrpc.cli.reach import reached
from fedgrpc.cli.stored_runs import find_run
from fedgrpc.client import Client
from fedgrpc.errors import LinkError, NotFound, UsageError
from fedgrpc.model_client import download
from fedgrpc.protocol.records import version_to_proto
from fedgrpc.rounds.version import Measure
from fedgrpc.runs.keeping import Reference, resolve
from fedgrpc.runs.versions import Versions
from fedgrpc.storage.database import DATABASE
from fedgrpc.storage.files import storage_errors
from fedgrpc.storage.folder import hold_folder
from fedgrpc.storage.model_file import ModelFile, write_model
from fedgrpc.storage.model_records import MODEL_RECORDS, ModelRecords
from fedgrpc.storage.run_store import RunStore
from fedgrpc.v1 import models_pb2 as pb
from fedgrpc.words import size

MODELS: Final = "models"


class VersionSource(Protocol):
    """Versions of the runs of one aggregator."""

    async def versions(self, run: str) -> pb.ListVersionsResponse:
        """Return the versions of a run that are kept.

        Raises `NotFound`, and `UsageError` where a run has to be named.
        """

    async def version(self, reference: Reference) -> pb.GetVersionResponse:
        """Return one version. Raises likewise."""

    async def fetch(self, found: pb.GetVersionResponse, path: Path) -> None:
        """Write a version to a file, with what is known of it as metadata."""

    async def tag(self, reference: Reference, tag: str) -> None:
        """Give a version a tag."""

    async def remove_tag(self, run: str, tag: str) -> None:
        """Take a tag away."""


@asynccontextmanager
async def version_source(values: Mapping[str, Any]) -> AsyncIterator[VersionSource]:
    """Reach the aggregator that the settings name, else read the data folder itself."""
    folder = values.get("data_dir")
    try:
        async with reached(values) as client:
            await client.healthy()
            live = LiveVersions(client)
            yield live
            return
    except LinkError:
        if folder is None:
            raise
    yield StoredVersions(folder)


@dataclass(frozen=True)
class LiveVersions:
    """Versions of a running aggregator."""

    client: Client

    async def versions(self, run: str) -> pb.ListVersionsResponse:
        """See `VersionSource`."""
        return await self.client.models.versions(run)

    async def version(self, reference: Reference) -> pb.GetVersionResponse:
        """See `VersionSource`."""
        return await self.client.models.version(reference.run, reference.name)

    async def fetch(self, found: pb.GetVersionResponse, path: Path) -> None:
        """See `VersionSource`. A download that breaks off is continued by the next one to the same file."""
        number = found.version.version.version
        stream = self.client.models.stream_of(found.run_id, number)
        with _shown_progress(path) as progress:
            await download(stream, path, metadata(found), progress)

    async def tag(self, reference: Reference, tag: str) -> None:
        """See `VersionSource`."""
        await self.client.models.tag(reference.run, reference.name, tag)

    async def remove_tag(self, run: str, tag: str) -> None:
        """See `VersionSource`."""
        await self.client.models.remove_tag(run, tag)


@dataclass(frozen=True)
class StoredVersions:
    """Versions in the data folder of an aggregator that does not run."""

    folder: Path

    async def versions(self, run: str) -> pb.ListVersionsResponse:
        """See `VersionSource`."""
        return self._find(run).listed()

    async def version(self, reference: Reference) -> pb.GetVersionResponse:
        """See `VersionSource`."""
        return self._find(reference.run).version(reference.name)

    async def fetch(self, found: pb.GetVersionResponse, path: Path) -> None:
        """See `VersionSource`."""
        self._find(found.run).copy(found, path)

    async def tag(self, reference: Reference, tag: str) -> None:
        """See `VersionSource`."""
        run = self._find(reference.run)
        number = run.version(reference.name).version.version.version
        with hold_folder(self.folder, "is in use by an aggregator that does not answer", "data folder"):
            run.save_tag(tag, number)

    async def remove_tag(self, run: str, tag: str) -> None:
        """See `VersionSource`."""
        found = self._find(run)
        if tag not in found.tags:
            raise NotFound(f"no version has the tag {tag[:80]!r}")
        with hold_folder(self.folder, "is in use by an aggregator that does not answer", "data folder"):
            found.save_tag(tag, None)

    def _find(self, name: str) -> _StoredRun:
        return _StoredRun.read(find_run(self.folder, name))


@dataclass(frozen=True)
class _StoredRun:
    """What a run's folder says of its versions."""

    folder: Path
    id: str
    name: str
    learning_task: str
    ended: bool
    known: Versions
    tags: dict[str, int]

    @classmethod
    def read(cls, folder: Path) -> _StoredRun:
        """Return the run of a folder."""
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
        path = self._path(number)
        record = pb.VersionRecord(
            version=version_to_proto(known),
            size_bytes=sum(spec.nbytes for spec in ModelFile.open(path).layout),
            tags=sorted(tag for tag, tagged in self.tags.items() if tagged == number),
            best=best is not None and best.version == number,
            latest=last is not None and last.version == number,
        )
        record.written_at.FromNanoseconds(path.stat().st_mtime_ns)
        return record

    def _path(self, number: int) -> Path:
        return self.folder / MODELS / f"{number:06d}.safetensors"

    def listed(self) -> pb.ListVersionsResponse:
        about = {"run": self.name, "run_id": self.id, "learning_task": self.learning_task}
        return pb.ListVersionsResponse(**about, versions=map(self._record, self.known))

    def version(self, name: str) -> pb.GetVersionResponse:
        number = resolve(name, self.known, self.tags, self.ended)
        about = {"run": self.name, "run_id": self.id, "learning_task": self.learning_task}
        return pb.GetVersionResponse(**about, version=self._record(number))

    def copy(self, found: pb.GetVersionResponse, path: Path) -> None:
        model = ModelFile.open(self._path(found.version.version.version))
        if not model.as_written:
            raise UsageError(f"{model.path} is corrupt: it has changed on the disk since it was written")
        tensors = (model.tensor(index) for index in range(len(model.layout)))
        write_model(path, model.layout, tensors, metadata(found))

    def save_tag(self, tag: str, number: int | None) -> None:
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


@contextmanager
def fetched(folder_name: str = "fedgrpc-model-") -> Iterator[Path]:
    """Yield a folder for files that nobody keeps."""
    folder = Path(tempfile.mkdtemp(prefix=folder_name))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _shown_progress(path: Path) -> Iterator[Any]:
    """Show how far a download is, on a terminal alone."""
    if not os.isatty(2):
        yield lambda done, of: None
        return

    def show(done: int, of: int) -> None:
        click.echo(f"\r{path.name}: {size(done)} of {size(of)}  ", nl=False, err=True)

    try:
        yield show
    finally:
        click.echo("\r\x1b[K", nl=False, err=True)
