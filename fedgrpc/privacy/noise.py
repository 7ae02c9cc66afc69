"""Noise of a round, drawn under the run's noise key: a commit that is computed again adds the same noise.

The rule: one round is never released under two noises, since their difference would tell the sum without noise. So
noise follows from the run's key, the round and the tensor alone, and a round that is played again after its noise
was used needs another number.

Independent noise is a stream a round. In a tree (DP-FTRL, arXiv 2103.00039) each node is a stream of its own. The
noisy sum of the first t rounds has the noise of the nodes in which the binary digits of t split them:

    N(t) = sum_j node(j, t >> j)   over the levels j whose bit of t is 1

A round adds N(t) - N(t - 1), so that the model, which is a sum over rounds, carries N(t): about log2(t) nodes,
where independent noise would carry t. Banded noise (`fedgrpc.privacy.banded`) adds up the last rounds' streams.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fedgrpc.codec.layout import Array
from fedgrpc.privacy.banded import coefficients
from fedgrpc.privacy.streams import RandomStream, derived_key


@dataclass(frozen=True)
class RoundNoise:
    """Standard normal noise of one round, by tensor; `key` is the run's noise key (32 bytes), secret for ever.

    `step` counts noisy releases from 1. `tree`: differences of a tree's noise in place of independent noise.
    `bands`: how many rounds a round's noise is of; 1: it is independent.
    """

    key: bytes
    step: int
    tree: bool = False
    bands: int = 1

    def __post_init__(self) -> None:
        if self.step < 1:
            raise ValueError(f"noisy rounds count from 1, not {self.step}")

    def normals(self, tensor: str, count: int, start: int = 0) -> Array:
        """Return the noise of `tensor` in this round: `count` float64, to be scaled by the standard deviation.

        Independent: of the standard normal distribution. In a tree: N(step) - N(step - 1). Banded: the sum of
        d_j z(step - j). Those from element `start` on, a multiple of 8, are the same however the tensor is cut.
        """
        if not self.tree:
            return self._banded(tensor, count, start)
        added, removed = set(_nodes(self.step)), set(_nodes(self.step - 1))
        total = np.zeros(count)
        for level, node in sorted(added - removed):
            total += self._stream("node", node, level, tensor, start).normals(count)
        for level, node in sorted(removed - added):
            total -= self._stream("node", node, level, tensor, start).normals(count)
        return total

    def _banded(self, tensor: str, count: int, start: int) -> Array:
        # The first is 1 times the round's own stream: without bands nothing is added or multiplied.
        total = self._stream("round", self.step, 0, tensor, start).normals(count)
        for before, factor in enumerate(coefficients(min(self.bands, self.step))[1:], start=1):
            total += factor * self._stream("round", self.step - before, 0, tensor, start).normals(count)
        return total

    def of_count(self) -> float:
        """Return the noise of this round's count of updates, of the standard normal distribution."""
        return float(self._stream("count", self.step, 0, "", 0).normals(1)[0])

    def _stream(self, kind: str, number: int, level: int, tensor: str, start: int) -> RandomStream:
        label = f"fedgrpc noise 1 {kind} {number} {level} {tensor}"
        # A number of the normal distribution is made of 8 bytes of the stream.
        return RandomStream(derived_key(self.key, label.encode()), 8 * start)


def _nodes(rounds: int) -> Iterator[tuple[int, int]]:
    """Yield (level, number within it) of the nodes that the first `rounds` rounds split into."""
    return ((level, rounds >> level) for level in range(rounds.bit_length()) if rounds >> level & 1)
