"""Update as the one vector of integers that a secure sum adds: all tensors in order, then the weight.

The rule: everything that gives an element its meaning (order, bounds, bits, coordinates, what a weight of 1 stands
for) comes with the task and is the same for all devices. The aggregator sets it from what it knows anyway, the
mean of the last round.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from math import isfinite, prod
from typing import Final

import numpy as np

from fedgrpc.codec.layout import Array
from fedgrpc.errors import EncodeError, LayoutError, UpdateRefused, UsageError
from fedgrpc.privacy.bounded_rounding import clip_norm, folded, squared_length
from fedgrpc.privacy.fixed_point import FixedPoint
from fedgrpc.privacy.one_time_keys import label
from fedgrpc.privacy.streams import RandomStream

# Devices' values spread more than their mean. Measured on Fashion-MNIST: 1 in 10,000 values is clipped. A margin
# of 2 clips 1 in 1,000, and costs 0.8 points of accuracy.
_MARGIN: Final = 4.0
# A tensor that did not change may change again.
_LEAST_SHARE: Final = 1e-6
_PIECE: Final = 1 << 15
# One of a million roundings of a clipped update is too long.
_MOST_DRAWS: Final = 20
_WORD_BITS: Final = 32
# Fewer elements would not tell the next bound of their tensor. With 10 of 1,024 a hundredth of values is clipped
# in the median of rounds, and a sixteenth in 1 of 20 (heavy-tailed values, Student's t of 4 degrees).
_LEAST_LEFT: Final = 256


@dataclass(frozen=True)
class SecureVector:
    """Vector of an update: `shapes` and `bounds` of its tensors by name, in the order of `shapes`.

    Values have `bits` bits and `count` devices take part. A weight has `weight_bits` bits: the largest stands for
    `most_examples`, and more count as that many. 0 bits: all weigh the same.

    With `norm` no device adds more than an update of that length, after rounding too, and none moves the sum
    further than that: what noise needs (`fedgrpc.privacy.bounded_rounding`). All tensors then have one bound.

    With `coordinates` C above 0 the vector has those elements of large tensors that follow from `seed`, each with
    the chance C / 2^32 (random mask, arXiv 1610.05492): the same on all devices. The others stay as they are.
    """

    shapes: Mapping[str, tuple[int, ...]]
    bounds: Mapping[str, float]
    bits: int
    weight_bits: int
    count: int
    most_examples: int = 1
    norm: float | None = None
    coordinates: int = 0
    seed: bytes = b""

    def __post_init__(self) -> None:
        if self.shapes.keys() != self.bounds.keys() or not self.shapes:
            raise UsageError("a secure sum has one bound for each tensor")
        if self.most_examples < 1:
            raise UsageError("the largest weight of a secure sum stands for one example at least")
        if self.norm is not None and not (isfinite(self.norm) and self.norm > 0):
            raise UsageError(f"the norm of a secure sum's updates is a number above 0, not {self.norm}")
        if self.norm is not None and (self.weight_bits or len(set(self.bounds.values())) > 1):
            raise UsageError("a secure sum of updates within a norm has one bound, and no weights")
        if not 0 <= self.coordinates < 1 << _WORD_BITS or (self.coordinates and self.norm is not None):
            raise UsageError(f"coordinates are a number below 2^{_WORD_BITS}, and 0 for updates within a norm")
        for name in self.shapes:
            self._grid(name)

    @property
    def sum_bits(self) -> int:
        """Bits of one element: all arithmetic is modulo 2 to this power."""
        return self._any_grid.sum_bits

    @cached_property
    def size(self) -> int:
        """Elements of the vector. Slow where coordinates have to be drawn."""
        return sum(self._count(name) for name in self.shapes) + 1

    def drawn(self) -> SecureVector:
        """Return this vector once its coordinates are drawn, so that nothing of it is slow any more. Blocks."""
        _ = self.size
        return self

    @cached_property
    def _chosen(self) -> dict[str, Array]:
        """Marks of the elements of each tensor that the vector has, flat; a tensor that is not here has all."""
        sizes, least = {name: prod(shape) for name, shape in self.shapes.items()}, _LEAST_LEFT << _WORD_BITS
        return {name: self._drawn(name, size) for name, size in sizes.items() if size * self.coordinates >= least}

    def _drawn(self, name: str, size: int) -> Array:
        stream = RandomStream(sha256(label("coordinates", self.seed, name.encode())).digest())
        marks = np.empty(size, bool)
        for start in range(0, size, _PIECE):
            piece = marks[start : start + _PIECE]
            np.less(stream.words(piece.size, _WORD_BITS), self.coordinates, out=piece)
        return marks

    def _count(self, name: str) -> int:
        marks = self._chosen.get(name)
        return prod(self.shapes[name]) if marks is None else int(np.count_nonzero(marks))

    @property
    def clip_norm(self) -> float | None:
        """The length that updates are clipped to before they are rounded; None: the task's."""
        return None if self.norm is None else clip_norm(self.norm, self._any_grid.step, self.size - 1)

    def weight_of(self, examples: int) -> int:
        """Return the weight, 1 to 2^weight_bits - 1, of a device with so many examples."""
        largest = max(1, (1 << self.weight_bits) - 1)
        return min(largest, max(1, round(examples / self.most_examples * largest)))

    def check(self, update: Mapping[str, Array]) -> None:
        """Raise LayoutError unless these are the tensors of the task."""
        if {name: tensor.shape for name, tensor in update.items()} != dict(self.shapes):
            raise LayoutError("the tensors of this update are not those of its task")

    def pieces(self, update: Mapping[str, Array], examples: int, rng: np.random.Generator) -> Iterator[Array]:
        """Yield the vector of `update` in pieces that fit the cache, uint64, tensor by tensor, then the weight.

        Raises LayoutError for tensors that are not those of the task, EncodeError for values that are not finite,
        and for an update that is longer than `norm` however it is rounded.
        """
        self.check(update)
        weight = self.weight_of(examples)
        if self.norm is not None:
            self._find_short(update, rng)
        yield from self._rounded(update, weight, rng)
        yield np.array([weight], np.uint64)

    def _rounded(self, update: Mapping[str, Array], weight: int, rng: np.random.Generator) -> Iterator[Array]:
        for name in self.shapes:
            grid, values = self._grid(name), update[name].reshape(-1)
            if name in self._chosen:
                values = values[self._chosen[name]]
            for start in range(0, values.size, _PIECE):
                yield grid.encode(values[start : start + _PIECE], weight, rng)

    def _find_short(self, update: Mapping[str, Array], rng: np.random.Generator) -> None:
        """Bring `rng` to where it draws a rounding that is no longer than `norm`."""
        assert self.norm is not None
        most = 2 * self.norm / self._any_grid.step
        for _ in range(_MOST_DRAWS):
            before = rng.bit_generator.state
            if sum(squared_length(piece, self.bits) for piece in self._rounded(update, 1, rng)) <= most * most:
                rng.bit_generator.state = before
                return
        raise EncodeError("no rounding of this update is within the norm of its task: it was not clipped enough")

    def means(self, total: Array) -> dict[str, Array]:
        """Return the weighted mean of each tensor, float64, from the sum of all vectors.

        NaN stands for the coordinates that the vector has not. Raises LayoutError for another size, and
        UpdateRefused for a sum that no honest devices make.
        """
        weight = int(total[-1])
        return {name: self._whole(name, self._grid(name).mean(part, weight)) for name, part in self._parts(total)}

    def examples(self, total: Array) -> float:
        """Return the examples that the weight of a sum stands for; without weights, one for each update."""
        return int(total[-1]) * self.most_examples / max(1, (1 << self.weight_bits) - 1)

    def shares(self, total: Array, count: int, cohort: int) -> dict[str, Array]:
        """Return the sum of `count` updates over `cohort`, by tensor, float64.

        One update moves it by `norm / cohort` at most, whatever the others are. Raises LayoutError for another
        size, and UpdateRefused where the weights are not those of so many devices: all have the same.
        """
        if int(total[-1]) != count:
            raise UpdateRefused(f"the weights of a secure sum of {count} updates add up to {int(total[-1])}")
        half_step = self._any_grid.step / 2 / cohort
        return {
            name: self._whole(name, half_step * folded(part, count, self.bits, self.sum_bits))
            for name, part in self._parts(total)
        }

    def _whole(self, name: str, values: Array) -> Array:
        """Return the tensor with these values where the vector has them, and NaN elsewhere."""
        if name in self._chosen:
            tensor = np.full(self._chosen[name].size, np.nan)
            tensor[self._chosen[name]] = values
            values = tensor
        return values.reshape(self.shapes[name])

    def _parts(self, total: Array) -> Iterator[tuple[str, Array]]:
        if total.shape != (self.size,):
            raise LayoutError(f"the sum has {total.size} elements, and not {self.size}")
        start = 0
        for name in self.shapes:
            end = start + self._count(name)
            yield name, total[start:end]
            start = end

    @property
    def _any_grid(self) -> FixedPoint:
        return self._grid(next(iter(self.shapes)))

    def _grid(self, name: str) -> FixedPoint:
        # Sums that devices spoil are folded within one bit more.
        spare_bits = 0 if self.norm is None else 1
        return FixedPoint(self.bounds[name], self.bits, self.weight_bits, self.count, spare_bits)


def bounds_after(means: Mapping[str, Array], clip_norm: float) -> dict[str, float]:
    """Return each tensor's bound for the next round: four times the largest value of the last mean.

    At most `clip_norm`, which no value of a clipped update exceeds. A bound that was too small grows fourfold each
    round until it fits. A tensor of which the sum said nothing has none.
    """
    # NaN is where the sum said nothing.
    largest = {name: np.abs(mean[~np.isnan(mean)]) for name, mean in means.items()}
    return {
        name: float(np.clip(_MARGIN * values.max(initial=0), _LEAST_SHARE * clip_norm, clip_norm))
        for name, values in largest.items()
        if values.size or not means[name].size
    }
