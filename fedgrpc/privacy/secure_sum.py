"""Device's side of a sum of masked integers: the aggregator learns the sum of all that arrived, and no vector.

SecAgg (Bonawitz et al., arXiv 1611.04482) on the graph of SecAgg+ (Bell et al., eprint 2020/704). With everything
modulo 2^bits:

    y_u = x_u + PRG(b_u) + sum_{v neighbour of u, u < v} PRG(s_uv) - sum_{v neighbour of u, v < u} PRG(s_uv)

s_uv follows from X25519 (RFC 7748) between one-time keys of u and v, so the pairs cancel in the sum. u shares its
self seed b_u and its masking key among its neighbours. After the deadline each of them answers once, with one
share for each neighbour: of b_u if u's vector arrived, of u's masking key if it did not. So the self masks of
those who arrived, and the pairwise masks of those who did not, can be taken away, and nothing else.

The rules of a participant:

- It answers one question a round and only that one again, so never for both secrets of a neighbour.
- It answers only if its own vector counts, and if at least a threshold of its neighbours' vectors do.
- It answers only if a threshold of its neighbours, and as many as its own `least` wants, confirmed that they were
  told the same roster and asked the same question (as in the consistency check of arXiv 1611.04482).
  Confirmations are HMAC-SHA256 under a key of each pair.
- Its masks follow from the roster too: those of two devices that were told different ones never cancel. With two
  rosters or two questions, an aggregator would else learn sums of a few devices.
- They follow from all that the round's devices are told alike, which the session names (`session_of`). With other
  tasks for all neighbours of a device, their vectors would else say nothing, and the sum would be that device's
  (arXiv 2111.07380). A device masks nothing before a threshold of neighbours have sealed shares in its session.

Whether names stand for devices is not known here: an aggregator that makes up neighbours sees through the masks.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from fedgrpc.codec.layout import Array
from fedgrpc.errors import UpdateRefused
from fedgrpc.privacy import shamir
from fedgrpc.privacy.masks import Masks
from fedgrpc.privacy.one_time_keys import (
    PublicKeys,
    Secrets,
    agreed,
    label,
    pair_mask_key,
    roster_digest,
    self_mask_key,
    sign,
)
from fedgrpc.privacy.streams import RandomStream, derived_key

_NONCE_BYTES: Final = 12
# Nonce, two shares, and the tag of ChaCha20-Poly1305.
SEALED_BYTES: Final = _NONCE_BYTES + 2 * shamir.SHARE_BYTES + 16
CONFIRMATION_BYTES: Final = 16
# The sum of two devices tells each of them the other's vector.
LEAST_NEIGHBOURS: Final = 2
_MOST_POINT: Final = (1 << 32) - 1


@dataclass(frozen=True)
class Circle:
    """A device of one round among its neighbours.

    `session` names the round and what all are told alike (`session_of`). `points` are the places (from 1) of all
    names in the round's order, at which shares are taken. `colluding` neighbours may work with the aggregator and
    answer both ways: the device's own setting, which the threshold has to allow for. `least` devices, this one and
    neighbours, have to be in the sum, by the device's own setting too. `roster` are all who have shared, once that
    is known.
    """

    session: bytes
    name: str
    neighbours: Mapping[str, PublicKeys]
    points: Mapping[str, int]
    threshold: int
    colluding: int = 0
    least: int = LEAST_NEIGHBOURS + 1
    roster: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        count = len(self.neighbours)
        if self.name in self.neighbours:
            raise UpdateRefused("a device is no neighbour of itself")
        least = max(self.least, LEAST_NEIGHBOURS + 1)
        if count + 1 < least:
            raise UpdateRefused(
                f"with its neighbours this device makes {count + 1}, and it joins secure sums of {least} at least"
            )
        if not 1 <= self.threshold <= count:
            raise UpdateRefused(f"{count} neighbours cannot reach a threshold of {self.threshold}")
        if 2 * self.threshold <= count + self.colluding:
            raise UpdateRefused(f"a threshold of {self.threshold} would let both secrets of a device be asked for")
        points = [self.points.get(name, 0) for name in (self.name, *self.neighbours)]
        if min(points) < 1 or max(points) > _MOST_POINT or len(set(points)) < len(points):
            raise UpdateRefused(f"the places of a round are distinct, from 1 to {_MOST_POINT}")
        for kind in ("masking", "sealing", "seed_check"):
            if len({getattr(keys, kind) for keys in self.neighbours.values()}) < count:
                raise UpdateRefused(f"two neighbours have the same {kind} key: one of them is a copy")

    def within(self, roster: AbstractSet[str]) -> Circle:
        """Return the circle of the neighbours in `roster`.

        Raises UpdateRefused if they are too few, or if the device itself is not on it.
        """
        if self.name not in roster:
            raise UpdateRefused("this device is not on the roster of its round")
        within = {name: keys for name, keys in self.neighbours.items() if name in roster}
        return replace(self, neighbours=within, roster=frozenset(roster))

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of everything in the circle."""
        parts = [self.session, self.name.encode(), self.points[self.name].to_bytes(4), self.threshold.to_bytes(4)]
        for name, keys in sorted(self.neighbours.items()):
            parts += [name.encode(), self.points[name].to_bytes(4), keys.masking, keys.sealing, keys.seed_check]
        return sha256(label("circle", *parts)).digest()


class Participant:
    """A device's side of one secure sum.

    It follows from circle and secrets, and remembers nothing: `secure_task` keeps what a device must remember.
    """

    def __init__(self, circle: Circle, secrets: Secrets) -> None:
        public = secrets.public
        for keys in circle.neighbours.values():
            if keys.masking == public.masking or keys.sealing == public.sealing:
                raise UpdateRefused("a neighbour has a copy of this device's keys")
        self.circle = circle
        self._secrets = secrets

    def sealed_shares(self) -> dict[str, bytes]:
        """Return for each neighbour its shares of the self seed and the masking key, sealed to it.

        The same circle gives the same bytes. Raises UpdateRefused for a public key that agrees on nothing.
        """
        digest = self.circle.digest
        # Another circle would have other polynomials and another nonce: no key seals two messages under one.
        stream = RandomStream(derived_key(self._secrets.sharing, label("polynomials", digest)))
        nonce = derived_key(self._secrets.sharing, label("nonce", digest))[:_NONCE_BYTES]
        points = {name: self.circle.points[name] for name in self.circle.neighbours}
        seed, masking = (
            shamir.split(int.from_bytes(secret), self.circle.threshold, points.values(), stream.raw)
            for secret in (self._secrets.self_seed, self._secrets.masking)
        )
        return {
            name: nonce
            + ChaCha20Poly1305(self._pair_key("shares", name, outwards=True)).encrypt(
                nonce, _share_bytes(seed[point]) + _share_bytes(masking[point]), None
            )
            for name, point in points.items()
        }

    def check_shares(self, sealed: Mapping[str, bytes]) -> None:
        """Raise UpdateRefused unless enough neighbours have sealed shares to this device in its own session."""
        found = sum(bool(self._opened(name, sealed.get(name, b""))) for name in self.circle.neighbours)
        if found < self._wanted:
            raise UpdateRefused(
                f"the shares of {found} neighbours can be opened, fewer than {self._wanted}: "
                "they were damaged, or others have another task"
            )

    def masked(self, values: Array, bits: int) -> Array:
        """Return `values` (unsigned, below 2^bits) plus all masks, modulo 2^bits, in the dtype of `word_dtype`."""
        return self.masks(bits).add_to(values)

    def masks(self, bits: int) -> Masks:
        """Return the masks as streams, for a vector that is masked a piece at a time."""
        digest, name = self._roster_digest, self.circle.name
        pairwise = [
            (pair_mask_key(self._secrets.masking, keys.masking, digest, name, other), sign(name, other))
            for other, keys in self.circle.neighbours.items()
        ]
        return Masks([(self_mask_key(self._secrets.self_seed, digest), 1), *pairwise], bits)

    def confirmations(self, arrived: AbstractSet[str]) -> dict[str, bytes]:
        """Return for each neighbour in `arrived` the proof (16 bytes) that this device was asked about `arrived`.

        The caller keeps `arrived` durably before it sends them, and confirms nothing else in this round. Raises
        UpdateRefused for a question that this device will not answer.
        """
        self._check_question(arrived)
        return {
            name: self._confirmation(name, arrived, outwards=True)
            for name in self.circle.neighbours.keys() & arrived
        }

    def answer(
        self, arrived: AbstractSet[str], confirmed: Mapping[str, bytes], sealed: Mapping[str, bytes]
    ) -> dict[str, bytes]:
        """Return one share (33 bytes) for each neighbour whose sealed shares are here and can be opened.

        `arrived` are the devices whose vectors count, by the aggregator's word: for these the share is of the self
        seed, for others of the masking key. It is what this device confirmed. `confirmed` are the neighbours'
        confirmations to this device. Raises UpdateRefused for a question that would tell too much.
        """
        self._check_question(arrived)
        agreeing = [
            name
            for name, proof in confirmed.items()
            if name in self.circle.neighbours
            and name in arrived
            and hmac.compare_digest(proof, self._confirmation(name, arrived, outwards=False))
        ]
        # Who does not confirm may be there by name alone: keys of a former round, whose masks are known by now.
        if len(agreeing) < self._wanted:
            raise UpdateRefused(f"{len(agreeing)} neighbours confirm this question, fewer than {self._wanted}")
        answers = {}
        for name in self.circle.neighbours:
            shares = self._opened(name, sealed.get(name, b""))
            # A neighbour whose shares are damaged harms its own secrets only: the others are answered for.
            if shares:
                answers[name] = shares[: shamir.SHARE_BYTES] if name in arrived else shares[shamir.SHARE_BYTES :]
        return answers

    def _check_question(self, arrived: AbstractSet[str]) -> None:
        if not arrived <= self.circle.roster:
            raise UpdateRefused("the question names devices that are not on the roster")
        if self.circle.name not in arrived:
            raise UpdateRefused("the sum that is asked about does not hold this device's update")
        mine = len(arrived & self.circle.neighbours.keys())
        if mine < self._wanted:
            raise UpdateRefused(f"{mine} neighbours are in the sum, fewer than {self._wanted}")

    @property
    def _wanted(self) -> int:
        """Number of neighbours that have to be in the sum, and to confirm it."""
        return max(self.circle.threshold, self.circle.least - 1)

    def _confirmation(self, name: str, arrived: AbstractSet[str], *, outwards: bool) -> bytes:
        names = label("arrived", self._roster_digest, *(each.encode() for each in sorted(arrived)))
        return hmac.digest(self._pair_key("confirmation", name, outwards=outwards), names, "sha256")[
            :CONFIRMATION_BYTES
        ]

    def _opened(self, name: str, sealed: bytes) -> bytes:
        """Return the two shares that `name` sealed to this device; nothing if they were changed on their way."""
        if len(sealed) != SEALED_BYTES:
            return b""
        cipher = ChaCha20Poly1305(self._pair_key("shares", name, outwards=False))
        try:
            return cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], None)
        except InvalidTag:
            return b""

    def _pair_key(self, use: str, name: str, *, outwards: bool) -> bytes:
        """Return the key of one direction between this device and `name`, for one use."""
        sender, receiver = (self.circle.name, name) if outwards else (name, self.circle.name)
        if name not in self._agreed:
            self._agreed[name] = agreed(self._secrets.sealing, self.circle.neighbours[name].sealing)
        return derived_key(self._agreed[name], label(use, self.circle.session, sender.encode(), receiver.encode()))

    @cached_property
    def _roster_digest(self) -> bytes:
        if not self.circle.roster:
            raise UpdateRefused("the roster of this round is not known yet")
        return roster_digest(self.circle.session, self.circle.roster)

    @cached_property
    def _agreed(self) -> dict[str, bytes]:
        return {}


def _share_bytes(value: int) -> bytes:
    return value.to_bytes(shamir.SHARE_BYTES)
