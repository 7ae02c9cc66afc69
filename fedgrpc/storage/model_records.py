"""Memory of a run about its model: tags of versions, and releases to devices, in SQLite beside the run's database.

The rule: a change is here before anybody is told. Everything blocks, and one thread at a time calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from fedgrpc.errors import LayoutError, UsageError
from fedgrpc.protocol.releases import release_from_proto, release_to_proto, report_to_proto
from fedgrpc.runs.release import Release, ReleasePhase, Releases
from fedgrpc.storage.database import Database, database_errors
from fedgrpc.v1 import models_pb2

MODEL_RECORDS: Final = "models.sqlite"
_VERSION: Final = 1
_SCHEMA: Final = """
CREATE TABLE tags (name TEXT PRIMARY KEY, version INTEGER NOT NULL) STRICT;
CREATE TABLE releases (number INTEGER PRIMARY KEY, phase INTEGER NOT NULL, record BLOB NOT NULL) STRICT;
CREATE TABLE reports (
    release INTEGER NOT NULL, worker TEXT NOT NULL, record BLOB NOT NULL, PRIMARY KEY (release, worker)) STRICT;
"""
_KEPT: Final = 100


class ModelRecords(Database):
    """Tags and releases of one run. Every method may raise `StorageError`."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Open the database at `path`. Raises `UsageError` for one of another version of the schema."""
        super().__init__(path, read_only=read_only, schema=_SCHEMA, version=_VERSION)

    def tags(self) -> dict[str, int]:
        """Read the version of each tag."""
        return dict(self._all("SELECT name, version FROM tags ORDER BY name"))

    def save_tag(self, name: str, version: int | None) -> None:
        """Give a version a tag; None: remove the tag."""
        with self._transaction():
            if version is None:
                self._db.execute("DELETE FROM tags WHERE name = ?", (name,))
            else:
                self._db.execute("INSERT OR REPLACE INTO tags VALUES (?, ?)", (name, version))

    def releases(self) -> Releases:
        """Read the release that was done last, and the one in progress."""
        active = self._all(
            "SELECT number, record FROM releases WHERE phase IN (?, ?) ORDER BY number DESC LIMIT 1",
            *(ReleasePhase.CANARY.value, ReleasePhase.ROLLOUT.value),
        )
        done = self._all(
            "SELECT number, record FROM releases WHERE phase = ? ORDER BY number DESC LIMIT 1",
            ReleasePhase.DONE.value,
        )
        return Releases(*(self._release(*rows[0]) if rows else None for rows in (done, active)))

    def last_releases(self) -> list[Release]:
        """Read the last releases, newest first, without reports."""
        rows = self._all("SELECT record FROM releases ORDER BY number DESC LIMIT ?", _KEPT)
        with self._reading():
            return [release_from_proto(models_pb2.Release.FromString(record), ()) for (record,) in rows]

    def release(self, number: int) -> Release | None:
        """Read a release with its reports."""
        row = self._one("SELECT record FROM releases WHERE number = ?", number)
        return None if row is None else self._release(number, row[0])

    def report_counts(self) -> dict[int, int]:
        """Read the number of reports of each release."""
        return dict(self._all("SELECT release, COUNT(*) FROM reports GROUP BY release"))

    def last_number(self) -> int:
        """Read the number of the newest release; 0: there was none."""
        row = self._one("SELECT MAX(number) FROM releases")
        return int(row[0] or 0) if row else 0

    def save(self, release: Release, device: str = "") -> None:
        """Store a release as it is now, with the report of `device`, or without it where there is none now."""
        record = release_to_proto(release, "").SerializeToString(deterministic=True)
        with self._transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO releases VALUES (?, ?, ?)", (release.number, release.phase.value, record)
            )
            if device and (report := release.reports.get(device)) is not None:
                blob = report_to_proto(device, report).SerializeToString(deterministic=True)
                self._db.execute("INSERT OR REPLACE INTO reports VALUES (?, ?, ?)", (release.number, device, blob))
            elif device:
                self._db.execute("DELETE FROM reports WHERE release = ? AND worker = ?", (release.number, device))
            oldest = release.number - _KEPT
            # What devices serve stays, however many releases were rolled back since.
            done = "(SELECT MAX(number) FROM releases WHERE phase = 3)"
            self._db.execute(f"DELETE FROM releases WHERE number <= ? AND number IS NOT {done}", (oldest,))
            self._db.execute("DELETE FROM reports WHERE release NOT IN (SELECT number FROM releases)")

    def _release(self, number: int, record: bytes) -> Release:
        rows = self._all("SELECT record FROM reports WHERE release = ?", number)
        with self._reading():
            reports = [models_pb2.DeviceReport.FromString(blob) for (blob,) in rows]
            return release_from_proto(models_pb2.Release.FromString(record), reports)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        with database_errors(self.path):
            try:
                yield
            except UsageError as error:
                raise LayoutError(str(error)) from error
