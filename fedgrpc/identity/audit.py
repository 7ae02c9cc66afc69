"""The audit log: who did what, from where, and how it ended; one line of JSON each, each sealed to the one before.

    {"n": 7, "at": "2026-03-01T10:00:00.000Z", "who": "the admin 'alice'", "from": "10.0.0.5:41822",
     "what": "Identity/RevokeMember", "about": {"name": "pi-7", "why": "stolen"}, "result": "ok", "seal": "9c.."}

    seal(n) = SHA-256(seal(n - 1) || line n without its seal),   seal(0) = 32 zero bytes

The rule: a line is only ever appended, and is in the file before the caller has an answer. Whoever changes,
removes or inserts a line breaks every seal from there on. Lines cut off at the end leave the rest whole: compare
the number and seal of the last line with a copy that was noted elsewhere.

Calls that change something are always recorded. Refusals of other calls are bounded, since anybody can cause them:
the same refusal once in ten minutes, ten kinds of each caller, and a hundred of all. A later line tells how many
were left out.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from fedgrpc.claims import Text
from fedgrpc.errors import CorruptError, UsageError
from fedgrpc.storage.files import storage_errors

AUDIT_FILE: Final = "audit.jsonl"
OK: Final = "ok"
_TEXT: Final = Text(200)
_MAX_FACTS: Final = 16
# Two lines: each has at most 4 + 2 * 16 texts, and a character takes up to 12 bytes of JSON.
_TAIL_BYTES: Final = 256 << 10
_MAX_PIECE_BYTES: Final = 1 << 20
_NO_SEAL: Final = bytes(32)
_FIELDS: Final = ("n", "at", "who", "from", "what", "about", "result")
# Of a damaged line: also nested without an end, and numbers of any size.
_UNREADABLE: Final = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)
_PERIOD_S: Final = 600.0
_MAX_REFUSALS: Final = 100
# Nobody alone uses up what is recorded of all.
_MAX_REFUSALS_EACH: Final = 10


@dataclass(frozen=True)
class AuditEntry:
    """One action: when (seconds since 1970), by whom, from where, what, and how it ended."""

    at: float
    who: str
    peer: str
    what: str
    about: Mapping[str, str] = field(default_factory=dict)
    result: str = OK


@dataclass(frozen=True)
class Position:
    """The end of a log: how many lines it has, and the seal of the last."""

    count: int = 0
    seal: bytes = _NO_SEAL


def sealed_line(entry: AuditEntry, after: Position) -> tuple[bytes, Position]:
    """Return the line of an entry behind `after`, with its line break, and the new end."""
    about = {_TEXT.cleaned(name): _TEXT.cleaned(value) for name, value in [*entry.about.items()][:_MAX_FACTS]}
    record = {
        "n": after.count + 1,
        "at": datetime.fromtimestamp(entry.at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "who": _TEXT.cleaned(entry.who),
        "from": _TEXT.cleaned(entry.peer),
        "what": _TEXT.cleaned(entry.what),
        "about": about,
        "result": _TEXT.cleaned(entry.result),
    }
    seal = _seal(record, after.seal)
    return _json({**record, "seal": seal.hex()}) + b"\n", Position(after.count + 1, seal)


def check_line(line: bytes, after: Position) -> tuple[dict[str, Any], Position]:
    """Return the record of a line and the end of the log behind it. Raises `CorruptError` for a broken seal."""
    try:
        record = json.loads(line)
        seal = bytes.fromhex(record.pop("seal"))
    except _UNREADABLE:
        raise CorruptError(f"line {after.count + 1} is not an entry of an audit log") from None
    # Compared as bytes: a line that says the same in other bytes was not written by this log.
    if record.get("n") != after.count + 1 or line != _json({**record, "seal": seal.hex()}) + b"\n":
        raise CorruptError(f"line {after.count + 1} was removed, inserted or changed")
    if tuple(record) != _FIELDS or not isinstance(record["about"], dict):
        raise CorruptError(f"line {after.count + 1} has not the fields of an entry")
    if seal != _seal(record, after.seal):
        raise CorruptError(f"line {after.count + 1}, or one before it, was changed")
    return record, Position(after.count + 1, seal)


def _end_of(line: bytes) -> Position:
    """Return the end of a log that ends with `line`, on the line's word. Raises `CorruptError`."""
    try:
        record = json.loads(line)
        return Position(int(record["n"]), bytes.fromhex(record["seal"]))
    except _UNREADABLE:
        raise CorruptError("the last line but one is not an entry of an audit log") from None


def _seal(record: dict[str, Any], before: bytes) -> bytes:
    return hashlib.sha256(before + _json(record)).digest()


def _json(record: dict[str, Any]) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode()


class AuditLog:
    """The file of a log while its aggregator runs. Written by one thread; any other may call `sync`."""

    def __init__(self, path: Path) -> None:
        """Open the file at `path`, or make it, for its owner alone.

        What a power cut has left of a line is removed. Raises `StorageError`, and `UsageError` for a file whose
        last line is damaged.
        """
        self._path = path
        self._synced = Position()
        self._recent: dict[tuple[str, str, str], float] = {}
        self._left_out = 0
        with storage_errors(path):
            # O_APPEND: no offset of ours can overwrite a line.
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                self._end = self._recover()
            except CorruptError as error:
                self.close()
                raise UsageError(
                    f"the audit log {path} is damaged: {error}; move the file away, and keep it: a new log begins"
                ) from error

    def _recover(self) -> Position:
        """Cut off a half line, and return the end. Only the last two lines are read: a log may be long."""
        size = os.fstat(self._handle).st_size
        start = max(0, size - _TAIL_BYTES)
        tail = os.pread(self._handle, _TAIL_BYTES, start)
        whole = tail[: tail.rfind(b"\n") + 1]
        if start and not whole:
            raise CorruptError(f"its last {len(tail)} bytes are no lines")
        if len(whole) < len(tail):
            os.ftruncate(self._handle, start + len(whole))
        before, last = [b"", b"", *whole.splitlines(keepends=True)][-2:]
        if not last:
            return Position()
        return check_line(last, _end_of(before) if before else Position())[1]

    @property
    def end(self) -> Position:
        """The last line's number and seal."""
        return self._end

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)

    def read(self, offset: int) -> bytes:
        """Return whole lines from `offset` on, at most 1 MiB; empty at the end.

        Raises `UsageError` for an offset behind the end, and `StorageError`.
        """
        with storage_errors(self._path, "read"):
            if offset > os.fstat(self._handle).st_size:
                raise UsageError(f"the audit log is shorter than {offset} bytes")
            piece = os.pread(self._handle, _MAX_PIECE_BYTES, offset)
        return piece[: piece.rfind(b"\n") + 1]

    def sync(self) -> None:
        """Make the lines so far outlive a power cut; a kill they outlive anyway. Raises `StorageError`."""
        end = self._end
        if end != self._synced:
            with storage_errors(self._path, "sync"):
                os.fsync(self._handle)
            self._synced = end

    def record(self, entry: AuditEntry) -> None:
        """Append an entry. Raises `StorageError`."""
        line, end = sealed_line(entry, self._end)
        with storage_errors(self._path, "write"):
            # One call for the whole line: a kill leaves all of it or none.
            written = os.write(self._handle, line)
            if written < len(line):
                # A full disk took a part of the line.
                os.ftruncate(self._handle, os.fstat(self._handle).st_size - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._end = end

    def refuse(self, entry: AuditEntry) -> None:
        """Append a refusal, unless there were too many. Raises `StorageError`."""
        kind = (entry.who, entry.what, entry.result)
        self._recent = {key: at for key, at in self._recent.items() if 0 <= entry.at - at < _PERIOD_S}
        own = sum(who == entry.who for who, _, _ in self._recent)
        if kind in self._recent or own >= _MAX_REFUSALS_EACH or len(self._recent) >= _MAX_REFUSALS:
            self._left_out += 1
            return
        self._recent[kind] = entry.at
        if self._left_out:
            entry = replace(entry, about={"refusals_left_out_before": str(self._left_out), **entry.about})
            self._left_out = 0
        self.record(entry)
