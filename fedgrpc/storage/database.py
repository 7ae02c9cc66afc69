"""The database of a data folder, in SQLite: its schema, its transactions, and what its errors mean.

The rule: a database is used by the version of the schema that wrote it, or not at all. Another one is refused in
one line, and stays as it is.

Once a version of the model is committed the database's file holds all of it: `run.sqlite` alone, without its
write-ahead log, is a copy of the run as of its last commit.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from google.protobuf.message import DecodeError

from fedgrpc.errors import LayoutError, StorageError, UsageError

DATABASE: Final = "run.sqlite"
# Add one whenever a table, or the meaning of a column, changes.
SCHEMA_VERSION: Final = 2
_SCHEMA: Final = """
CREATE TABLE run (
    one INTEGER PRIMARY KEY CHECK (one = 1), id TEXT NOT NULL, name TEXT NOT NULL, phase INTEGER NOT NULL,
    end_reason INTEGER NOT NULL, reason TEXT NOT NULL, started_at REAL NOT NULL,
    paused_reason TEXT NOT NULL) STRICT;
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE workers (
    name TEXT PRIMARY KEY, registration BLOB NOT NULL, selected INTEGER NOT NULL DEFAULT 0,
    accepted INTEGER NOT NULL DEFAULT 0) STRICT;
CREATE TABLE sessions (worker TEXT PRIMARY KEY, session TEXT NOT NULL) STRICT;
CREATE TABLE histories (worker TEXT PRIMARY KEY, history BLOB NOT NULL) STRICT;
CREATE TABLE versions (version INTEGER PRIMARY KEY, round INTEGER NOT NULL, record BLOB NOT NULL) STRICT;
CREATE TABLE rounds (
    number INTEGER PRIMARY KEY, open INTEGER NOT NULL, aim INTEGER NOT NULL, deadline_at REAL NOT NULL,
    record BLOB NOT NULL) STRICT;
CREATE TABLE tasks (
    token TEXT PRIMARY KEY, round INTEGER NOT NULL, slot INTEGER NOT NULL, worker TEXT NOT NULL,
    phase INTEGER NOT NULL, reason TEXT NOT NULL, staleness INTEGER NOT NULL, chosen TEXT NOT NULL,
    local_model BLOB NOT NULL, loss_cause INTEGER NOT NULL) STRICT;
CREATE TABLE releases (step INTEGER PRIMARY KEY, record BLOB NOT NULL) STRICT;
CREATE TABLE last_steps (worker TEXT PRIMARY KEY, step INTEGER NOT NULL) STRICT;
CREATE INDEX tasks_by_round ON tasks (round, slot);
"""

Row = tuple[Any, ...]


class Database:
    """One connection to the database at `path`, with its schema. One thread at a time uses it."""

    def __init__(
        self, path: Path, *, read_only: bool = False, schema: str = _SCHEMA, version: int = SCHEMA_VERSION
    ) -> None:
        """Open the database, or make it with `schema`; `read_only`: beside the process that owns it.

        Raises:
            UsageError: another version of the schema wrote it.
            StorageError: it cannot be opened.
        """
        self.path = path
        self._schema_version = version
        with database_errors(path):
            name = f"{path.absolute().as_uri()}?mode=ro" if read_only else path
            # sqlite3's own transactions begin at the first write, so `_transaction` begins them. Threads of a pool
            # take turns here, so the connection may not insist on the thread that opened it.
            self._db = sqlite3.connect(name, uri=read_only, isolation_level=None, check_same_thread=False)
            is_new = not read_only and not self._one("SELECT 1 FROM sqlite_master")
            if not is_new:
                self._check_version()
            if not read_only:
                self._db.execute("PRAGMA journal_mode=WAL")
                # A commit is on the disk when it returns: what is acknowledged outlives a power cut.
                self._db.execute("PRAGMA synchronous=FULL")
            if is_new:
                # Tables and version in one transaction: after a kill half way the database is a new one again.
                self._db.executescript(f"BEGIN; {schema} PRAGMA user_version = {version}; COMMIT;")

    def _check_version(self) -> None:
        (found,) = self._db.execute("PRAGMA user_version").fetchone()
        if found != self._schema_version:
            self.close()
            raise UsageError(
                f"{self.path} was written by another version of fedgrpc (schema {found}, not "
                f"{self._schema_version}); use that version, or a new data folder"
            )

    def close(self) -> None:
        """Close the connection; no method may be called any more."""
        self._db.close()

    def _one(self, query: str, *values: object) -> Row | None:
        with database_errors(self.path):
            row: Row | None = self._db.execute(query, values).fetchone()
        return row

    def _all(self, query: str, *values: object) -> list[Row]:
        with database_errors(self.path):
            return self._db.execute(query, values).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing of the block, durable once it is left."""
        with database_errors(self.path), self._db:
            # The lock for writing at once: to ask for it after a read could fail half way.
            self._db.execute("BEGIN IMMEDIATE")
            yield

    def _checkpoint(self) -> None:
        """Move all of the write-ahead log into the database's file. What fails here is still in the log."""
        with suppress(sqlite3.Error):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


@contextmanager
def database_errors(path: Path) -> Iterator[None]:
    """Around use of a database and its records: what fails is a `StorageError`."""
    try:
        yield
    except sqlite3.Error as error:
        raise StorageError(f"the database {path} failed: {error}") from error
    except (DecodeError, LayoutError, ValueError, TypeError) as error:
        # A damaged page gives rows of other types than their table's, NULL among them.
        raise StorageError(f"the database {path} is damaged: {error}") from error
