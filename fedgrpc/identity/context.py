"""Context file of an operator: where the aggregator is, whom to trust there, and the operator's own certificate.

One PEM file for all of it, since OpenSSL and gRPC each read what they look for:

    # fedgrpc context of the viewer 'alice'
    # aggregator: 192.168.1.10:50051
    # renew after: 1796000000
    certificate, private key and authorities

The rule: only its owner may read it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedgrpc.errors import CorruptError, UsageError
from fedgrpc.identity.certificates import load_certificates, server_name_of, uris_of
from fedgrpc.identity.folder import check_private
from fedgrpc.identity.roles import Identity, identity_from
from fedgrpc.storage.files import make_private, storage_errors, write_file

_MAX_BYTES: Final = 64 << 10
_AGGREGATOR: Final = re.compile(r"^# aggregator: (\S{1,300})$", re.MULTILINE)
_RENEW_AFTER: Final = re.compile(r"^# renew after: (\d{1,12})$", re.MULTILINE)
_KEY: Final = re.compile(r"-----BEGIN PRIVATE KEY-----\n[A-Za-z0-9+/=\n]+-----END PRIVATE KEY-----\n")


@dataclass(frozen=True)
class Context:
    """A context file that was read; `renew_after` is in seconds since 1970, by this machine's clock."""

    path: Path
    aggregator: str
    renew_after: float
    server_name: str
    identity: Identity
    _key: str

    @classmethod
    def read(cls, path: Path) -> Context:
        """Read a context file. Raises `UsageError`."""
        try:
            check_private(path)
            text = path.read_text(encoding="ascii", errors="replace")[:_MAX_BYTES]
            certificates = load_certificates(text.encode())
        except OSError as error:
            raise UsageError(f"cannot read the context {path}: {error.strerror}") from error
        except CorruptError as error:
            raise UsageError(f"{path} is no context file: {error}") from error
        aggregator, renew_after, key = _AGGREGATOR.search(text), _RENEW_AFTER.search(text), _KEY.search(text)
        if aggregator is None or renew_after is None or key is None or len(certificates) < 2:
            raise UsageError(f"{path} is no context file: `fedgrpc operator create` makes one")
        own, authority = certificates[:2]
        identity = identity_from(uris_of(own))
        return cls(path, aggregator[1], float(renew_after[1]), server_name_of(authority), identity, key[0])

    def renewed(self, certificate: bytes, ca: bytes, renew_after: float) -> None:
        """Write the file anew with another certificate. Raises `StorageError`."""
        write_context(self.path, self.identity, self.aggregator, renew_after, certificate, self._key.encode(), ca)


def write_context(
    path: Path, identity: Identity, aggregator: str, renew_after: float, certificate: bytes, key: bytes, ca: bytes
) -> None:
    """Write a context file; certificate, key and authority are PEM. Raises `StorageError`."""
    head = f"# fedgrpc context of {identity}\n# aggregator: {aggregator}\n# renew after: {renew_after:.0f}\n"
    with storage_errors(path):
        make_private(path.absolute().parent)
        write_file(path, head.encode() + certificate + key + ca, private=True)
