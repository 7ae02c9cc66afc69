"""One-time keys of a device for one secure sum, and what follows from them.

The rule: a device draws 32 random bytes for each round, everything else follows from them, and the bytes never
leave the device. So the same question gets the same bytes, also after a restart. The labels of HKDF-SHA256
(RFC 5869) give each part's length, so no two uses ever share a key.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import Final

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from fedgrpc.errors import UpdateRefused
from fedgrpc.privacy.streams import KEY_BYTES, derived_key


@dataclass(frozen=True)
class KeySignature:
    """Signature of a device's public keys with the key of its certificate (see `key_statement`).

    `signed_at` is by the device's clock, in seconds since 1970. `chain` has the device's certificate, then those
    between it and its authority, each in DER.
    """

    signed_at: int
    value: bytes
    chain: tuple[bytes, ...]


@dataclass(frozen=True)
class PublicKeys:
    """One-time X25519 public keys (RFC 7748) of a device, for masks and for sealing shares; 32 bytes each.

    `seed_check` (32 bytes) follows from the self seed one way: it tells a right seed from a wrong one. Keys are
    equal with and without a `signature`.
    """

    masking: bytes
    sealing: bytes
    seed_check: bytes
    signature: KeySignature | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if {len(self.masking), len(self.sealing), len(self.seed_check)} != {KEY_BYTES}:
            raise UpdateRefused(f"each of a device's public keys has {KEY_BYTES} bytes")


@dataclass(frozen=True)
class Secrets:
    """Secrets of a device for one round, from `master` (32 random bytes), which stays on the device.

    `self_seed` and `masking` are shared among neighbours, and one of the two is told to the aggregator. `sealing`
    and `sharing`, which draws the polynomials of the shares, are told to nobody.
    """

    # Kept out of the text of the object, which may be logged.
    master: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.master) != KEY_BYTES:
            raise ValueError(f"secrets follow from {KEY_BYTES} bytes, not {len(self.master)}")

    @cached_property
    def masking(self) -> bytes:
        return derived_key(self.master, label("masking"))

    @cached_property
    def sealing(self) -> bytes:
        return derived_key(self.master, label("sealing"))

    @cached_property
    def self_seed(self) -> bytes:
        return derived_key(self.master, label("self seed"))

    @cached_property
    def sharing(self) -> bytes:
        return derived_key(self.master, label("sharing"))

    @cached_property
    def public(self) -> PublicKeys:
        """Halves of the secrets that everybody may know."""
        return PublicKeys(public_of(self.masking), public_of(self.sealing), seed_check_of(self.self_seed))


def label(use: str, *parts: bytes) -> bytes:
    """Return the HKDF label of `use` for `parts`, in which no part can be mistaken for a piece of another."""
    named: Final = b"fedgrpc secure sum 1 " + use.encode()
    return b"".join(len(part).to_bytes(4) + part for part in (named, *parts))


def public_of(secret: bytes) -> bytes:
    """Return the public half of an X25519 secret."""
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def seed_check_of(seed: bytes) -> bytes:
    """Return what everybody may know of a self seed: enough to recognise it, not to find it."""
    return derived_key(seed, label("seed check"))


def agreed(secret: bytes, public: bytes) -> bytes:
    """Return what X25519 makes of one's secret and another's public key, or raise UpdateRefused."""
    try:
        return X25519PrivateKey.from_private_bytes(secret).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise UpdateRefused("a public key of a neighbour agrees on nothing: it is a point of low order") from None


def key_statement(run_id: str, worker: str, keys: PublicKeys, signed_at: int) -> bytes:
    """Return what a device signs: that these are its keys, in this run, at this time (seconds since 1970)."""
    names = (run_id.encode(), worker.encode())
    return label("signed keys", *names, keys.masking, keys.sealing, keys.seed_check, signed_at.to_bytes(8))


def acceptable(keys: Mapping[str, PublicKeys]) -> dict[str, PublicKeys]:
    """Return the keys, by device, that no neighbour refuses: of no low order, and no copies of another's.

    Without this one bad device could make all others refuse a sum. All copies go: which is the first is not known.
    """
    counts = Counter(each for one in keys.values() for each in (one.masking, one.sealing, one.seed_check))
    return {
        name: one
        for name, one in keys.items()
        if max(counts[one.masking], counts[one.sealing], counts[one.seed_check]) == 1
        and _agrees(one.masking)
        and _agrees(one.sealing)
    }


def _agrees(public: bytes) -> bool:
    """Return whether X25519 agrees on something with this key: for a point of low order no secret does."""
    try:
        agreed(bytes(KEY_BYTES), public)
    except UpdateRefused:
        return False
    return True


def session_of(common: bytes) -> bytes:
    """Return what names the session of a sum whose devices were all told `common`.

    All keys of the sum follow from it: devices that were told different things share none.
    """
    return sha256(label("session", common)).digest()


def roster_digest(session: bytes, roster: Iterable[str]) -> bytes:
    """Return what names a session together with all who take part in its sum.

    Masks follow from it: those of devices that were told different rosters do not cancel.
    """
    return sha256(label("roster", session, *(name.encode() for name in sorted(roster)))).digest()


def self_mask_key(seed: bytes, digest: bytes) -> bytes:
    """Return the key of the mask that a device adds for itself; `digest` is that of the roster."""
    return derived_key(seed, label("self mask", digest))


def pair_mask_key(secret: bytes, public: bytes, digest: bytes, name: str, other: str) -> bytes:
    """Return the key of the mask of a pair of devices; `secret` is of one of them, `public` of the other.

    `digest` is that of the roster. The key follows from the names too: a device that deposits a copy of another's
    keys shares no mask with it.
    """
    names = (part.encode() for part in sorted((name, other)))
    return derived_key(agreed(secret, public), label("pair mask", digest, *names))


def sign(name: str, other: str) -> int:
    """Return the sign with which `name` adds the mask that it has with `other`."""
    return 1 if name < other else -1
