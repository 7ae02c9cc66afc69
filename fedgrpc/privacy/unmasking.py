"""Aggregator's side of a sum of masked integers (see `secure_sum`): from the answers to the masks left in it.

The rule: a share is a claim. A secret counts once it fits the public key that its device deposited, and whoever
sent shares that do not fit is asked last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from fedgrpc.errors import FedgrpcError
from fedgrpc.privacy import shamir
from fedgrpc.privacy.masks import Masks
from fedgrpc.privacy.one_time_keys import (
    PublicKeys,
    pair_mask_key,
    public_of,
    roster_digest,
    seed_check_of,
    self_mask_key,
    sign,
)
from fedgrpc.privacy.streams import KEY_BYTES


class SumLost(FedgrpcError):
    """Too few devices answered, or a share was wrong: this round's sum cannot be had."""


@dataclass(frozen=True)
class Unmasking:
    """The aggregator's knowledge of one round after its deadline.

    `graph` has the neighbours of each device of the roster, all of them on it: those whose masks may be in the
    sum. `keys`, `points` and `thresholds` are theirs, as all devices were told.
    """

    session: bytes
    keys: Mapping[str, PublicKeys]
    graph: Mapping[str, tuple[str, ...]]
    points: Mapping[str, int]
    thresholds: Mapping[str, int]

    def masks(self, arrived: AbstractSet[str], answers: Mapping[str, Mapping[str, bytes]], bits: int) -> Masks:
        """Return what to add to the sum of the masked vectors of `arrived`, so that the masks are gone.

        `answers` are the shares by who answered and whom they are about. Raises SumLost when too few answered for
        a device, or when shares do not give back the secret that its public key belongs to; ValueError for a
        device in `arrived` that is not in the graph.
        """
        if not arrived <= self.graph.keys():
            raise ValueError(f"{min(arrived - self.graph.keys())!r} is not on the roster: its masks do not cancel")
        digest = roster_digest(self.session, self.graph)
        suspects: set[str] = set()
        signed_keys: list[tuple[bytes, int]] = []
        for name in sorted(arrived):
            seed = self._secret(name, answers, suspects, seed_check_of, self.keys[name].seed_check)
            signed_keys.append((self_mask_key(seed, digest), -1))
        for name in sorted(self._dropped(arrived)):
            secret = self._secret(name, answers, suspects, public_of, self.keys[name].masking)
            # The vectors of its neighbours still hold its masks, each with the neighbour's sign.
            signed_keys += [
                (pair_mask_key(secret, self.keys[other].masking, digest, name, other), -sign(other, name))
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
        suspects: set[str],
        known: Callable[[bytes], bytes],
        expected: bytes,
    ) -> bytes:
        """Return the secret of `name` from its neighbours' shares: the one of which `known` is `expected`.

        Neighbours whose shares are off the polynomial join `suspects`.
        """
        threshold = self.thresholds[name]
        shares = {
            other: share
            for other in sorted(self.graph[name], key=lambda other: (other in suspects, other))
            if len(share := answers.get(other, {}).get(name, b"")) == shamir.SHARE_BYTES
        }
        if len(shares) < threshold:
            raise SumLost(f"{len(shares)} devices answered for {name!r}, fewer than {threshold}")
        ordered = [(self.points[other], int.from_bytes(share)) for other, share in shares.items()]
        # One device that sends a wrong share stands in some of these windows, but not in all.
        for start in range(len(ordered)):
            window = dict((ordered[start:] + ordered[:start])[:threshold])
            secret = shamir.combine(window)
            if not secret >> (8 * KEY_BYTES) and known(secret.to_bytes(KEY_BYTES)) == expected:
                if start:
                    suspects |= {other for other, share in shares.items() if not self._fits(other, share, window)}
                return secret.to_bytes(KEY_BYTES)
        raise SumLost(f"the shares of {name!r} do not fit its keys: it or its neighbours sent wrong ones")

    def _fits(self, other: str, share: bytes, window: Mapping[int, int]) -> bool:
        return shamir.combine(window, at=self.points[other]) == int.from_bytes(share)
