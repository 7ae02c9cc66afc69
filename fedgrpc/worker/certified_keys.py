"""One-time keys of this device and of its neighbours under certificates.

The rule: a device with a certificate signs its keys, and is neighbour of no device whose keys are not signed. One
without takes keys as the aggregator tells them. `--only-secure` needs a certificate, or it would promise too much.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from fedgrpc.errors import UsageError
from fedgrpc.identity.signed_keys import KeyCheck, KeySigner
from fedgrpc.privacy.one_time_keys import PublicKeys
from fedgrpc.worker.settings import WorkerSettings


class CertifiedKeys:
    """Signs the keys of a device that has a certificate, and checks those of its neighbours."""

    def __init__(self, worker: str, signer: KeySigner, authorities: Path, revoked: Path | None) -> None:
        self._worker = worker
        self._signer = signer
        self._authorities = authorities
        self._revoked = revoked

    @classmethod
    def of(cls, settings: WorkerSettings) -> CertifiedKeys | None:
        """Return those of a worker; None: it has no certificate.

        Raises `UsageError` where a setting needs a certificate, or one has no authority to check others by.
        """
        tls = settings.tls
        if tls is None or tls.certificate is None or tls.key is None:
            if settings.only_secure or settings.secure_ca is not None:
                raise UsageError(
                    "only_secure and secure_ca need a certificate, since without one nobody knows whose keys "
                    "are in a secure sum: join with a token, or give tls_ca, tls_cert and tls_key"
                )
            return None
        authorities = settings.secure_ca or tls.ca
        if authorities is None:
            if settings.only_secure:
                raise UsageError("only_secure needs secure_ca or tls_ca: the authority of the other devices")
            return None
        return cls(settings.name, KeySigner(tls.certificate, tls.key), authorities, settings.secure_crl)

    def signed(self, run_id: str, keys: PublicKeys) -> PublicKeys:
        """Return this device's keys with its signature. Blocks. Raises `StorageError`."""
        return self._signer.signed(run_id, self._worker, keys, time.time())

    def check(self, run_id: str, neighbours: Mapping[str, PublicKeys]) -> None:
        """Raise `UpdateRefused` for keys that their device has not signed for this run. Blocks.

        Raises `StorageError` where the authorities, or the list of those revoked, cannot be read.
        """
        # Read each time: a renewed certificate may bring other authorities, and the list of revoked ones grows.
        check = KeyCheck.read(self._authorities, self._revoked)
        for name, keys in neighbours.items():
            check.check(run_id, name, keys, time.time())
