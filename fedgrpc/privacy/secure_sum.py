"""Sum of masked integers: the aggregator learns the sum of all vectors that arrived, and no vector by itself.

SecAgg (Bonawitz et al., arXiv 1611.04482) on the graph of SecAgg+ (Bell et al., eprint 2020/704). With everything
modulo 2^bits:

    y_u = x_u + PRG(b_u) + sum_{v neighbour of u, u < v} PRG(s_uv) - sum_{v neighbour of u, v < u} PRG(s_uv)

s_uv follows from X25519 (RFC 7748) between one-time keys of u and v, so the pairs cancel in the sum. u shares its
self seed b_u and its masking key among its neighbours. After the deadline each of them answers once, with one
share for each neighbour: of b_u if u's vector arrived, of u's masking key if it did not. So the self masks of
those who arrived, and the pairwise masks of those who did not, can be taken away, and nothing else.

The rules of a participant: it answers one question a round and only that one again, never for both secrets of a
neighbour; it answers only if its own vector counts, and if at least a threshold of its neighbours' vectors do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from fedgrpc.codec.layout import Array
from fedgrpc.errors import FedgrpcError, UpdateRefused
from fedgrpc.privacy import shamir
from fedgrpc.privacy.streams import KEY_BYTES, RandomStream, derived_key, word_dtype

# Two shares and the tag of ChaCha20-Poly1305.
SEALED_BYTES: Final = 2 * shamir.SHARE_BYTES + 16


class SumLost(FedgrpcError):
    """Too few devices answered, or a share was wrong: this round's sum cannot be had."""


@dataclass(frozen=True)
class PublicKeys:
    """One-time X25519 public keys of a device, for masks and for sealing shares; 32 bytes each.

    `seed_check` (32 bytes) follows from the self seed one way: it tells a right seed from a wrong one.
    """

    masking: bytes
    sealing: bytes
    seed_check: bytes

    def __post_init__(self) -> None:
        if {len(self.masking), len(self.sealing), len(self.seed_check)} != {KEY_BYTES}:
            raise UpdateRefused(f"each of a device's public keys has {KEY_BYTES} bytes")


@dataclass(frozen=True)
class Secrets:
    """One-time secrets of a device (32 bytes each). They are used for one round, and stay on the device."""

    masking: bytes
    sealing: bytes
    self_seed: bytes

    @classmethod
    def drawn(cls, draw: Callable[[int], bytes]) -> Secrets:
        """Return new secrets; `draw(n)` returns n random bytes."""
        return cls(draw(KEY_BYTES), draw(KEY_BYTES), draw(KEY_BYTES))

    @property
    def public(self) -> PublicKeys:
        """Halves of the secrets that everybody may know."""
        return PublicKeys(_public(self.masking), _public(self.sealing), _seed_check(self.self_seed))


@dataclass(frozen=True)
class Circle:
    """A device of one round among its neighbours.

    `session` names the round for all (any bytes, different each time). `points` are the places (from 1) of all
    names in the round's order, at which shares are taken.
    """

    session: bytes
    name: str
    neighbours: Mapping[str, PublicKeys]
    points: Mapping[str, int]
    threshold: int

    def __post_init__(self) -> None:
        if self.name in self.neighbours:
            raise UpdateRefused("a device is no neighbour of itself")
        if not 1 <= self.threshold <= len(self.neighbours):
            raise UpdateRefused(f"{len(self.neighbours)} neighbours cannot reach a threshold of {self.threshold}")
        if 2 * self.threshold <= len(self.neighbours):
            raise UpdateRefused("a threshold of half the neighbours or less would let both secrets be asked for")
        points = [self.points.get(name, 0) for name in (self.name, *self.neighbours)]
        if min(points) < 1 or len(set(points)) < len(points):
            raise UpdateRefused("the places of a round are distinct and count from 1")


class Participant:
    """A device's side of one secure sum."""

    def __init__(self, circle: Circle, secrets: Secrets) -> None:
        self.circle = circle
        self._secrets = secrets

    def sealed_shares(self, draw: Callable[[int], bytes]) -> dict[str, bytes]:
        """Return for each neighbour its shares of the self seed and the masking key, sealed to it.

        `draw(n)` returns n random bytes. Raises UpdateRefused for a public key that agrees on nothing.
        """
        seed, masking = (
            shamir.split(int.from_bytes(secret), self.circle.threshold, self._points.values(), draw)
            for secret in (self._secrets.self_seed, self._secrets.masking)
        )
        return {
            name: ChaCha20Poly1305(self._sealing_key(name, outwards=True)).encrypt(
                bytes(12), _share_bytes(seed[point]) + _share_bytes(masking[point]), None
            )
            for name, point in self._points.items()
        }

    def masked(self, values: Array, bits: int) -> Array:
        """Return `values` (unsigned, below 2^bits) plus all masks, modulo 2^bits, in the dtype of `word_dtype`."""
        return self.masks(bits).add_to(values)

    def masks(self, bits: int) -> Masks:
        """Return the masks as streams, for a vector that is masked a piece at a time."""
        pairwise = [
            (_mask_key(self._secrets.masking, keys.masking, self.circle.session), _sign(self.circle.name, name))
            for name, keys in self.circle.neighbours.items()
        ]
        return Masks([(_self_mask_key(self._secrets.self_seed, self.circle.session), 1), *pairwise], bits)

    def answer(
        self, arrived: AbstractSet[str], sealed: Mapping[str, bytes], answered: AbstractSet[str] | None
    ) -> dict[str, bytes]:
        """Return one share (33 bytes) for each neighbour whose sealed shares are here.

        `arrived` are the devices whose vectors count, by the aggregator's word: for these the share is of the self
        seed, for others of the masking key. `answered` is what an earlier answer of this round was about; the
        caller keeps `arrived` durably before it sends the answer. Raises UpdateRefused for a question that would
        tell too much, or for shares that were changed.
        """
        self._check_question(arrived, answered)
        answers = {}
        for name in self.circle.neighbours:
            if name in sealed:
                shares = self._opened(name, sealed[name])
                answers[name] = shares[: shamir.SHARE_BYTES] if name in arrived else shares[shamir.SHARE_BYTES :]
        return answers

    def _check_question(self, arrived: AbstractSet[str], answered: AbstractSet[str] | None) -> None:
        mine = arrived & self.circle.neighbours.keys()
        if answered is not None and answered & self.circle.neighbours.keys() != mine:
            raise UpdateRefused("this round was answered for other devices: two answers would open an update")
        if self.circle.name not in arrived:
            raise UpdateRefused("the sum that is asked about does not hold this device's update")
        if len(mine) < self.circle.threshold:
            raise UpdateRefused(f"{len(mine)} neighbours are in the sum, fewer than {self.circle.threshold}")

    def _opened(self, name: str, sealed: bytes) -> bytes:
        key = self._sealing_key(name, outwards=False)
        try:
            shares = ChaCha20Poly1305(key).decrypt(bytes(12), sealed, None)
        except InvalidTag:
            raise UpdateRefused(f"the shares of {name!r} were changed on their way") from None
        if len(shares) != 2 * shamir.SHARE_BYTES:
            raise UpdateRefused(f"the shares of {name!r} have {len(shares)} bytes")
        return shares

    @cached_property
    def _points(self) -> dict[str, int]:
        return {name: self.circle.points[name] for name in self.circle.neighbours}

    def _sealing_key(self, name: str, *, outwards: bool) -> bytes:
        """Return the key of the shares of one direction between this device and `name`: it seals one message."""
        sender, receiver = (self.circle.name, name) if outwards else (name, self.circle.name)
        agreed = _agreed(self._secrets.sealing, self.circle.neighbours[name].sealing)
        label = b"\0".join((b"fedgrpc shares 1", self.circle.session, sender.encode(), receiver.encode()))
        return derived_key(agreed, label)


class Masks:
    """Masks of one vector as streams, added in the order in which the vector is drawn."""

    def __init__(self, signed_keys: Iterable[tuple[bytes, int]], bits: int) -> None:
        self._streams = [(RandomStream(key), sign) for key, sign in signed_keys]
        self._bits = bits

    def add_to(self, values: Array) -> Array:
        """Return the next piece `values` plus its masks, modulo 2^bits, in the dtype of `word_dtype`."""
        dtype = word_dtype(self._bits)
        total = values.astype(dtype)
        for stream, sign in self._streams:
            mask = stream.words(values.size, self._bits).reshape(values.shape)
            np.add(total, mask, out=total) if sign > 0 else np.subtract(total, mask, out=total)
        masked: Array = total & dtype.type((1 << self._bits) - 1)
        return masked


@dataclass(frozen=True)
class Unmasking:
    """The aggregator's side after the deadline, of one round.

    `keys` are the public keys of all, `graph` the neighbours of each. `shared` are those whose sealed shares went
    out: nobody else may be in a sum.
    """

    session: bytes
    keys: Mapping[str, PublicKeys]
    graph: Mapping[str, tuple[str, ...]]
    points: Mapping[str, int]
    thresholds: Mapping[str, int]

    def masks(self, arrived: AbstractSet[str], answers: Mapping[str, Mapping[str, bytes]], bits: int) -> Masks:
        """Return what to add to the sum of the masked vectors of `arrived`, so that the masks are gone.

        `answers` are the shares by who answered and whom they are about. Raises SumLost when too few answered for
        a device, or when shares do not give back the secret that its public key belongs to.
        """
        signed_keys: list[tuple[bytes, int]] = []
        for name in sorted(arrived):
            seed = self._secret(name, answers, _seed_check, self.keys[name].seed_check)
            signed_keys.append((_self_mask_key(seed, self.session), -1))
        for name in sorted(self._dropped(arrived)):
            masking = self._secret(name, answers, _public, self.keys[name].masking)
            # The vectors of its neighbours still hold its masks, each with the neighbour's sign.
            signed_keys += [
                (_mask_key(masking, self.keys[other].masking, self.session), -_sign(other, name))
                for other in self.graph[name]
                if other in arrived
            ]
        return Masks(signed_keys, bits)

    def _dropped(self, arrived: AbstractSet[str]) -> set[str]:
        """Return those whose vectors did not arrive and whose masks are in one that did."""
        return {name for name in self.graph if name not in arrived and not arrived.isdisjoint(self.graph[name])}

    def _secret(
        self,
        name: str,
        answers: Mapping[str, Mapping[str, bytes]],
        known: Callable[[bytes], bytes],
        expected: bytes,
    ) -> bytes:
        """Return the secret of `name` from its neighbours' shares: the one of which `known` is `expected`."""
        threshold = self.thresholds[name]
        shares = [
            (self.points[other], int.from_bytes(answers[other][name]))
            for other in self.graph[name]
            if name in answers.get(other, {})
        ]
        if len(shares) < threshold:
            raise SumLost(f"{len(shares)} devices answered for {name!r}, fewer than {threshold}")
        # One device that sends a wrong share stands in some of these windows, but not in all.
        for start in range(len(shares)):
            window = (shares[start:] + shares[:start])[:threshold]
            secret = shamir.combine(dict(window))
            if not secret >> (8 * KEY_BYTES) and known(secret.to_bytes(KEY_BYTES)) == expected:
                return secret.to_bytes(KEY_BYTES)
        raise SumLost(f"the shares of {name!r} do not fit its keys: devices sent wrong ones")


def _sign(name: str, other: str) -> int:
    return 1 if name < other else -1


def _public(secret: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def _agreed(secret: bytes, public: bytes) -> bytes:
    try:
        return X25519PrivateKey.from_private_bytes(secret).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise UpdateRefused("a public key of a neighbour agrees on nothing: it is a point of low order") from None


def _mask_key(secret: bytes, public: bytes, session: bytes) -> bytes:
    return derived_key(_agreed(secret, public), b"fedgrpc mask 1\0" + session)


def _self_mask_key(seed: bytes, session: bytes) -> bytes:
    return derived_key(seed, b"fedgrpc self mask 1\0" + session)


def _seed_check(seed: bytes) -> bytes:
    return derived_key(seed, b"fedgrpc seed check 1")


def _share_bytes(value: int) -> bytes:
    return value.to_bytes(shamir.SHARE_BYTES)
