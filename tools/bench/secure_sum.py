"""Bytes and CPU of a secure sum against devices and model size, and the accuracy that its grid keeps.

    python -m tools.bench.secure_sum costs --workers 3 16 64 256 --elements 100000 1000000 --dropped 0.2
    python -m tools.bench.secure_sum accuracy --bits 4 5 6 8 --rounds 15 --seeds 2

`costs` plays whole sums of virtual devices in one process: the machine of the aggregator, the memories of the
devices, every message. Each sum is held against the plain sum of the same integers first, bit for bit, on 1,000
elements. Then up to three devices mask vectors of the full size; CPU seconds (not wall time) of a device are their
mean, and those of the aggregator's sum are of one such vector times the number that arrived. Bytes are those of
the messages' contents, without framing. `expansion` is all bytes of a device, both ways, over the update alone at
`--bits` each. That is how Bonawitz et al. (arXiv 1611.04482) count 1.73 for 1,024 users, 2^20 values of 16 bits.

`accuracy` trains a small network on Fashion-MNIST, shared out to 16 workers by Dirichlet(0.5), with float updates
and with secure sums of integers. The bound of each tensor is four times the
largest value of the last round's mean. Training draws the same numbers each time.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from statistics import mean

import numpy as np

from fedgrpc.codec.layout import Array
from fedgrpc.privacy.fixed_point import FixedPoint
from fedgrpc.privacy.masks import pack_words, unpack_words
from fedgrpc.privacy.neighbours import neighbours, threshold_of
from fedgrpc.privacy.one_time_keys import Secrets
from fedgrpc.privacy.secure_round import (
    Answered,
    Arrived,
    Confirmed,
    SecurePhase,
    SecureRound,
    Shared,
    TimeUp,
    Unmask,
    step,
)
from fedgrpc.privacy.secure_sum import Circle
from fedgrpc.privacy.secure_task import SecureTask
from fedgrpc.privacy.streams import word_dtype

_CHECKED_ELEMENTS = 1000
_TIMED_DEVICES = 3
_PIECE = 1 << 18
_POINT_BYTES = 4


@dataclass
class Costs:
    """CPU seconds of one device and of the aggregator, and bytes of one device each way."""

    device_keys_s: float = 0.0
    device_masks_s: float = 0.0
    sum_s: float = 0.0
    secrets_s: float = 0.0
    unmask_s: float = 0.0
    up_bytes: float = 0.0
    down_bytes: float = 0.0


@dataclass
class VirtualSum:
    """One secure sum of virtual devices: `play` it, then read `costs` and use `unmasked`."""

    count: int
    bits: int
    dropped: float
    seed: int
    costs: Costs = field(default_factory=Costs)

    def __post_init__(self) -> None:
        self.rng = Random(self.seed)
        self.names = [f"device-{number:04}" for number in range(self.count)]
        secrets = {name: Secrets(self.rng.randbytes(32)) for name in self.names}
        graph = neighbours(self.names, np.random.default_rng(self.seed))
        self.round = SecureRound(
            session=self.rng.randbytes(16),
            keys={name: secrets[name].public for name in self.names},
            graph=graph,
            points={name: place for place, name in enumerate(self.names, start=1)},
            thresholds={name: threshold_of(len(graph[name])) for name in self.names},
        )
        self.tasks = {name: SecureTask(self._circle(name), secrets[name]) for name in self.names}
        self.up = dict.fromkeys(self.names, 96)
        self.down = {name: (96 + _POINT_BYTES) * len(graph[name]) for name in self.names}

    def _circle(self, name: str) -> Circle:
        around = {other: self.round.keys[other] for other in self.round.graph[name]}
        return Circle(self.round.session, name, around, self.round.points, self.round.thresholds[name])

    def share(self) -> None:
        """Play the round until everybody knows the roster."""
        for name in self.names:
            with self._timed("device_keys_s", self.count):
                boxes = self.tasks[name].sealed_shares()
            self._sent(name, boxes)
            self.round, _ = step(self.round, Shared(name, boxes))
        for name in self.names:
            boxes = self.round.boxes_for(name)
            self._got(name, boxes)
            self.tasks[name] = self.tasks[name].with_roster(self.round.roster, boxes)

    def arrive(self) -> None:
        """Let all but the dropped deliver their updates."""
        self.arrived = sorted(self.rng.sample(self.names, self.count - int(self.count * self.dropped)))
        for name in self.arrived:
            self.tasks[name] = self.tasks[name].with_masked(bytes(32))
            self.round, _ = step(self.round, Arrived(name))
        self.round, _ = step(self.round, TimeUp(SecurePhase.MASKING))

    def answer(self) -> Unmask:
        """Ask all who arrived, and return what the aggregator then has."""
        for name in self.arrived:
            with self._timed("device_keys_s", len(self.arrived)):
                self.tasks[name] = self.tasks[name].with_question(frozenset(self.arrived))
                proofs = self.tasks[name].confirmations()
            self._sent(name, proofs)
            self.round, effects = step(self.round, Confirmed(name, proofs))
        for name in self.arrived:
            proofs = self.round.proofs_for(name)
            self._got(name, proofs)
            with self._timed("device_keys_s", len(self.arrived)):
                shares = self.tasks[name].answer(proofs)
            self._sent(name, shares)
            self.round, effects = step(self.round, Answered(name, shares))
        unmask = effects[0]
        assert isinstance(unmask, Unmask)
        self.costs.up_bytes = mean(self.up[name] for name in self.arrived)
        self.costs.down_bytes = mean(self.down[name] for name in self.arrived)
        return unmask

    def mask(self, name: str, values: Array) -> Array:
        """Return the packed masked vector of a device; a piece at a time, as it would be sent."""
        masks = self.tasks[name].masks(self.bits)
        pieces = [values[start : start + _PIECE] for start in range(0, values.size, _PIECE)]
        return np.concatenate([pack_words(masks.add_to(piece), self.bits) for piece in pieces])

    def unmasked(self, total: Array, unmask: Unmask) -> Array:
        """Return the sum without its masks."""
        with self._timed("secrets_s"):
            masks = self.round.unmasking.masks(unmask.arrived, unmask.answers, self.bits)
        with self._timed("unmask_s"):
            pieces = [total[start : start + _PIECE] for start in range(0, total.size, _PIECE)]
            return np.concatenate([masks.add_to(piece) for piece in pieces])

    def sum_of(self, packed: list[Array], size: int) -> Array:
        """Return the sum of packed masked vectors, modulo the word's size."""
        total = np.zeros(size, word_dtype(self.bits))
        for vector in packed:
            total += unpack_words(vector, size, self.bits)
        return total

    def _sent(self, name: str, parts: dict[str, bytes]) -> None:
        self.up[name] += sum(map(len, parts.values()))

    def _got(self, name: str, parts: dict[str, bytes]) -> None:
        # With the roster or the set of updates that count, a bit for each device.
        self.down[name] += sum(map(len, parts.values())) + (self.count + 7) // 8

    @contextmanager
    def _timed(self, what: str, devices: int = 1) -> Iterator[None]:
        began = time.process_time()
        yield
        setattr(self.costs, what, getattr(self.costs, what) + (time.process_time() - began) / devices)


def measured(count: int, grid: FixedPoint, elements: int, dropped: float, seed: int) -> Costs:
    """Return what one sum costs, after it was held against the plain sum."""
    world = VirtualSum(count, grid.sum_bits, dropped, seed)
    costs, draws = world.costs, np.random.default_rng(seed)
    world.share()
    small = {name: draws.integers(0, 1 << grid.bits, _CHECKED_ELEMENTS, dtype=np.uint64) for name in world.names}
    packed = {name: world.mask(name, values) for name, values in small.items()}
    big = draws.integers(0, 1 << grid.bits, elements, dtype=np.uint64)
    timed = world.names[:_TIMED_DEVICES]
    for name in timed:
        with world._timed("device_masks_s", len(timed)):
            vector = world.mask(name, big)
    world.arrive()
    unmask = world.answer()
    total = world.sum_of([packed[name] for name in world.arrived], _CHECKED_ELEMENTS)
    plain = sum(small[name] for name in world.arrived)
    assert np.array_equal(world.unmasked(total, unmask), plain), "the sum is not the plain sum"
    costs.secrets_s = costs.unmask_s = 0.0
    with world._timed("sum_s"):
        total = world.sum_of([vector], elements)
    costs.sum_s *= len(world.arrived)
    world.unmasked(total, unmask)
    costs.up_bytes += vector.nbytes
    return costs


def costs(arguments: argparse.Namespace) -> None:
    print(f"load {os.getloadavg()[0]:.1f}, updates of {arguments.bits} bits, {arguments.dropped:.0%} dropped")
    print("                       | device                                        | aggregator")
    print("workers elements  bits |   up kB   down kB expansion  keys s  masks s |    sum s secrets s unmask s")
    for count in arguments.workers:
        for elements in arguments.elements:
            grid = FixedPoint(1.0, arguments.bits, 0, count)
            cost = measured(count, grid, elements, arguments.dropped, seed=count)
            expansion = (cost.up_bytes + cost.down_bytes) / (elements * arguments.bits / 8)
            device = f"{cost.up_bytes / 1e3:8.1f} {cost.down_bytes / 1e3:8.1f} {expansion:9.2f}"
            device += f" {cost.device_keys_s:7.3f} {cost.device_masks_s:8.3f}"
            aggregator = f"{cost.sum_s:8.3f} {cost.secrets_s:9.3f} {cost.unmask_s:8.3f}"
            print(f"{count:7} {elements:8} {grid.sum_bits:5} | {device} | {aggregator}", flush=True)


def accuracy(arguments: argparse.Namespace) -> None:
    from tools.bench.secure_accuracy import accuracies

    print(f"load {os.getloadavg()[0]:.1f}, {arguments.rounds} rounds, seeds {arguments.seeds}")
    plain: list[float] = []
    for bits in (0, *arguments.bits):
        # Without a secure sum there are no coordinates to leave out.
        some = {"coordinates": arguments.coordinates, "server_rate": arguments.server_rate} if bits else {}
        played = [accuracies(bits, arguments.rounds, seed, **some) for seed in range(arguments.seeds)]
        scores, clipped = [score for score, _ in played], max(share for _, share in played)
        plain = plain or scores
        points = [100 * (score - without) for score, without in zip(scores, plain, strict=True)]
        name = f"secure, {bits} bits" if bits else "float, no secure sum"
        found = " ".join(f"{score:.2%}" for score in scores)
        print(f"{name:22} {mean(scores):.2%}  ({found})  clipped {clipped:.3%}", flush=True)
        print(
            f"{'':22} points from float: {mean(points):+.2f}, {min(points):+.2f} to {max(points):+.2f}", flush=True
        )


def reach(arguments: argparse.Namespace) -> None:
    from tools.bench.secure_accuracy import lengths_left

    for device, share in enumerate(lengths_left(arguments.bits, arguments.seed)):
        left = ", ".join(f"{bits} bits {part:.3f}" for bits, part in zip(arguments.bits, share, strict=True))
        print(f"device {device}: length left on the grid for noise: {left}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(required=True)
    table = commands.add_parser("costs")
    table.add_argument("--workers", type=int, nargs="+", default=[3, 16, 64, 256])
    table.add_argument("--elements", type=int, nargs="+", default=[100_000, 1_000_000])
    table.add_argument("--bits", type=int, default=8)
    table.add_argument("--dropped", type=float, default=0.0, help="share of devices that never deliver")
    table.set_defaults(run=costs)
    scores = commands.add_parser("accuracy")
    scores.add_argument("--bits", type=int, nargs="+", default=[4, 5, 6, 8])
    scores.add_argument("--rounds", type=int, default=15)
    scores.add_argument("--seeds", type=int, default=2)
    scores.add_argument("--coordinates", type=float, default=1.0, help="share of each large tensor in a sum")
    scores.add_argument("--server-rate", type=float, default=1.0, help="how many times a mean counts")
    scores.set_defaults(run=accuracy)
    limits = commands.add_parser("reach")
    limits.add_argument("--bits", type=int, nargs="+", default=[4, 5, 6, 8])
    limits.add_argument("--seed", type=int, default=0)
    limits.set_defaults(run=reach)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
