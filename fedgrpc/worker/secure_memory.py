"""Device's memory of secure sums on its disk: the keys that it has deposited, and what it has fixed in each sum.

    secure/key        the 32 bytes from which the keys of the next sum follow
    secure/TOKEN      one sum: its keys, and what `fedgrpc.privacy.secure_task` fixes, by the SHA-256 of its token

The rule: what is fixed is on the disk, durably, before anything that follows from it is sent. A key leaves `key`
before it is used, so no key is in two sums. A file that is gone or damaged answers nothing: that is safe. Blocks.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from pathlib import Path
from typing import Any, Final

from fedgrpc.errors import CorruptError, UpdateRefused
from fedgrpc.privacy.one_time_keys import PublicKeys, Secrets
from fedgrpc.privacy.secure_sum import Circle
from fedgrpc.privacy.secure_task import KeyRing, SecureTask
from fedgrpc.privacy.streams import KEY_BYTES
from fedgrpc.storage.files import make_private, storage_errors, write_file
from fedgrpc.storage.sealed_file import read_sealed, write_sealed

# Sums that may still be asked about. Of older ones the memory is removed, and with it every answer.
_KEPT_SUMS: Final = 8


class SecureMemory:
    """The secure sums of one run on this device. Raises `StorageError` where its folder cannot be used."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ring: KeyRing | None = None
        # A call whose task was cancelled goes on in its thread, beside the next one.
        self._lock = threading.RLock()

    def public_keys(self) -> PublicKeys:
        """Return the keys for the next sum; new ones are on the disk before they are told."""
        with self._lock:
            ring = self._loaded()
            if not ring.unused:
                ring = ring.filled(1, secrets.token_bytes)
                with storage_errors(self._folder):
                    make_private(self._folder)
                    write_file(self._folder / "key", ring.unused[0].master, private=True)
                self._ring = ring
            return ring.unused[0].public

    def begin(self, token: str, circle: Circle, keys: PublicKeys) -> SecureTask:
        """Return this device's part in the sum of a task, as far as it has come.

        Raises `UpdateRefused` for keys that were used or are not this device's, and for another circle than
        before.
        """
        with self._lock:
            known = self._read(token)
            if known is not None:
                # What the owner demands of a sum now, and not what a former process did.
                return self.fix(token, SecureTask(circle, known.secrets))
            ring, own = self._loaded().take(keys)
            # The key first: a crash in between loses this sum, and never uses a key twice.
            with storage_errors(self._folder):
                (self._folder / "key").unlink(missing_ok=True)
            self._ring = ring
            begun = self.fix(token, SecureTask(circle, own))
            self._forget_old(_name_of(token))
            return begun

    def of(self, token: str) -> SecureTask:
        """Return this device's part in the sum of a task. Raises `UpdateRefused` where there is none."""
        known = self._read(token)
        if known is None:
            raise UpdateRefused("this device knows nothing of that secure sum")
        return known

    def fix(self, token: str, task: SecureTask) -> SecureTask:
        """Store what is fixed of a sum, durably, and return it with what was fixed there before.

        Raises `UpdateRefused` where that is something else.
        """
        with self._lock:
            if (stored := self._read(token)) is not None:
                task = task.with_fixed(stored)
            with storage_errors(self._folder):
                make_private(self._folder)
            write_sealed(self._folder / _name_of(token), _described(task))
            return task

    def _loaded(self) -> KeyRing:
        if self._ring is None:
            with storage_errors(self._folder):
                path = self._folder / "key"
                master = path.read_bytes() if path.exists() else b""
            self._ring = KeyRing((Secrets(master),)) if len(master) == KEY_BYTES else KeyRing()
        return self._ring

    def _read(self, token: str) -> SecureTask | None:
        try:
            told = read_sealed(self._folder / _name_of(token))
        except CorruptError as error:
            raise UpdateRefused(f"this device answers nothing more for a secure sum: {error}") from error
        return None if told is None else _task_of(told)

    def _forget_old(self, newest: str) -> None:
        with storage_errors(self._folder):
            # By name: the clock may have fallen back since the others were written.
            sums = [path for path in self._folder.iterdir() if len(path.name) == 64 and path.name != newest]
            for path in sorted(sums, key=lambda each: each.stat().st_mtime)[: 1 - _KEPT_SUMS]:
                path.unlink()


def _name_of(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _described(task: SecureTask) -> dict[str, Any]:
    circle = task.circle
    return {
        "master": task.secrets.master.hex(),
        "session": circle.session.hex(),
        "name": circle.name,
        "neighbours": {
            name: [keys.masking.hex(), keys.sealing.hex(), keys.seed_check.hex()]
            for name, keys in circle.neighbours.items()
        },
        "points": dict(circle.points),
        "threshold": circle.threshold,
        "colluding": circle.colluding,
        "least": circle.least,
        "roster": None if task.roster is None else sorted(task.roster),
        "sealed": {name: box.hex() for name, box in task.sealed.items()},
        "masked_digest": task.masked_digest.hex(),
        "arrived": None if task.arrived is None else sorted(task.arrived),
    }


def _keys_of(told: list[str]) -> PublicKeys:
    masking, sealing, seed_check = map(bytes.fromhex, told)
    return PublicKeys(masking, sealing, seed_check)


def _task_of(told: dict[str, Any]) -> SecureTask:
    circle = Circle(
        bytes.fromhex(told["session"]),
        told["name"],
        {name: _keys_of(keys) for name, keys in told["neighbours"].items()},
        told["points"],
        told["threshold"],
        told["colluding"],
        told["least"],
    )
    return SecureTask(
        circle,
        Secrets(bytes.fromhex(told["master"])),
        None if told["roster"] is None else frozenset(told["roster"]),
        {name: bytes.fromhex(box) for name, box in told["sealed"].items()},
        bytes.fromhex(told["masked_digest"]),
        None if told["arrived"] is None else frozenset(told["arrived"]),
    )
