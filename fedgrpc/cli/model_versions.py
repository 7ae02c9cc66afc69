"""Sources of a run's versions: a running aggregator, or the data folder of one that does not run."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import click

from fedgrpc.calls import Calls
from fedgrpc.cli.reach import reached
from fedgrpc.cli.stored_runs import find_run
from fedgrpc.errors import LinkError, NotFound
from fedgrpc.model_client import download
from fedgrpc.runs.keeping import Reference
from fedgrpc.storage.folder import hold_folder
from fedgrpc.storage.stored_run import StoredRun, metadata
from fedgrpc.v1 import models_pb2 as pb
from fedgrpc.words import size


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

    client: Calls

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

    def _find(self, name: str) -> StoredRun:
        return StoredRun.read(find_run(self.folder, name))


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
