"""Files of keys and certificates, for either side.

    authorities.pem                   keys and certificates of an aggregator's authorities, in DATA/identity
    ca.pem, key.pem, certificate.pem  what a device joined with, in STATE/identity

The rule: keys are readable by their owner alone, in a folder of the owner's alone. Both is checked at each
start: a key that others could read is not used.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from fedgrpc.errors import CorruptError, StorageError, UsageError
from fedgrpc.identity.certificates import (
    Authority,
    Certificate,
    PrivateKey,
    authorities_pem,
    key_pem,
    key_sha256,
    load_authorities,
    load_certificate,
    load_certificates,
    load_key,
    make_key,
    public_key_of,
    server_name_of,
    uris_of,
)
from fedgrpc.identity.roles import Identity, identity_from
from fedgrpc.storage.files import make_private, storage_errors, write_file

IDENTITY: Final = "identity"
AUTHORITIES: Final = "authorities.pem"
_OTHERS: Final = 0o077
_WORLD: Final = 0o007

# The key stays, so the device has its name again, also with a token that is used up.
_REMEDY: Final = "remove certificate.pem beside the key, and join again with a token"

log = structlog.get_logger()


def warn_if_open(folder: Path) -> None:
    """Log a warning where every user of this machine may enter `folder`. Raises `StorageError`.

    No error: volumes, and folders made beforehand, come with such modes. The folder of the keys is checked.
    """
    with storage_errors(folder):
        mode = stat.S_IMODE(folder.stat().st_mode)
    if mode & _WORLD:
        log.warning("others may enter the data folder", mode=f"{mode:o}", remedy=f"chmod 700 {folder}")


def check_private(path: Path) -> None:
    """Raise `UsageError` for a file or folder that other users may open. Nothing happens where there is none.

    One that only this process's own group may open becomes private: Kubernetes opens volumes to it (fsGroup).
    """
    with storage_errors(path):
        if not path.exists():
            return
        found = path.stat()
        mode, private = stat.S_IMODE(found.st_mode), 0o700 if path.is_dir() else 0o600
        if not mode & _OTHERS:
            return
        if not mode & _WORLD and found.st_gid == os.getegid() and found.st_uid == os.geteuid():
            path.chmod(private)
            log.warning("made private", path=str(path), reason=f"its group could open it (mode {mode:o})")
            return
    raise UsageError(f"others may open {path} (mode {mode:o}): make it private with chmod {private:o} {path}")


@dataclass(frozen=True)
class AuthorityFile:
    """The aggregator's authorities in one file, so that a rotation is one write: before it or after it."""

    path: Path

    def opened(self, has_members: bool = False) -> tuple[Authority, ...]:
        """Return the authorities, newest first; make one where there is no file.

        Raises `UsageError`, where others may read the keys, and `StorageError`. The latter also where there is no
        file though there are members: another authority would put them all out.
        """
        _make_folder(self.path.parent)
        with storage_errors(self.path):
            if not self.path.exists():
                if has_members:
                    raise StorageError(
                        f"{self.path} is missing, by which devices know this aggregator: bring it back from a "
                        f"backup, or remove {self.path.parent} and let all of them join again"
                    )
                made = (Authority.make(),)
                self.write(made)
                return made
            check_private(self.path)
            try:
                return load_authorities(self.path.read_bytes())
            except CorruptError as error:
                raise StorageError(f"{self.path}: {error}; bring it back from a backup") from error

    def write(self, authorities: Iterable[Authority]) -> None:
        """Store the authorities in place of those before. Raises `StorageError`."""
        with storage_errors(self.path):
            write_file(self.path, authorities_pem(authorities), private=True)


def _make_folder(folder: Path) -> None:
    with storage_errors(folder):
        make_private(folder)
    check_private(folder)


@dataclass(frozen=True)
class DeviceFolder:
    """The folder in which a device keeps its key and what it joined with."""

    path: Path

    @property
    def ca(self) -> Path:
        """File of the authorities that the device trusts."""
        return self.path / "ca.pem"

    @property
    def key(self) -> Path:
        """File of the device's private key."""
        return self.path / "key.pem"

    @property
    def certificate(self) -> Path:
        """File of the device's certificate."""
        return self.path / "certificate.pem"

    @property
    def joined(self) -> bool:
        """True if the device has a certificate."""
        return self.certificate.exists()

    def own_key(self) -> PrivateKey:
        """Return the device's key; make it if there is none. Raises `UsageError` and `StorageError`."""
        _make_folder(self.path)
        with storage_errors(self.key):
            if not self.key.exists():
                made = make_key()
                write_file(self.key, key_pem(made), private=True)
                return made
            check_private(self.key)
            try:
                return load_key(self.key.read_bytes())
            except CorruptError as error:
                raise StorageError(f"{self.key}: {error}") from error

    def save(self, certificate: bytes, ca: bytes) -> None:
        """Store a new certificate and the authorities to trust, as PEM. Raises `StorageError`."""
        with storage_errors(self.path):
            # The certificate last: it says that the device has joined.
            write_file(self.ca, ca)
            write_file(self.certificate, certificate)

    def own_certificate(self) -> Certificate:
        """Return the device's certificate. Raises `UsageError`, and `StorageError` unless the key is its own."""
        if not self.key.exists():
            raise StorageError(
                f"the key of this device's certificate is lost: there is no {self.key}. Have an operator forget "
                f"the device, remove {self.path}, and join again"
            )
        key = self.own_key()
        with storage_errors(self.certificate):
            try:
                certificate = load_certificate(self.certificate.read_bytes())
            except CorruptError as error:
                raise StorageError(f"{self.certificate}: {error}; {_REMEDY}") from error
        if key_sha256(public_key_of(certificate)) != key_sha256(key.public_key()):
            raise StorageError(f"{self.certificate} does not belong to {self.key}; join again with a new token")
        return certificate

    def identity(self) -> Identity:
        """Return name and role of the device's certificate. Raises as `own_certificate`, and `NotEnrolled`."""
        return identity_from(uris_of(self.own_certificate()))

    def authority_sha256s(self) -> set[bytes]:
        """Return the SHA-256 of the key of each authority that the device trusts. Raises `StorageError`."""
        return {key_sha256(public_key_of(each)) for each in self._authorities()}

    def server_name(self) -> str:
        """Return the host name that this device expects of its aggregator: the newest authority's.

        Raises `StorageError`.
        """
        return server_name_of(self._authorities()[0])

    def _authorities(self) -> list[Certificate]:
        with storage_errors(self.ca):
            try:
                return load_certificates(self.ca.read_bytes())
            except FileNotFoundError:
                raise StorageError(f"{self.ca} is missing; {_REMEDY}") from None
            except CorruptError as error:
                raise StorageError(f"{self.ca}: {error}; {_REMEDY}") from error
