"""Channel groups and blocks of a model, and the channels and blocks of a sub-model.

Channels that must be kept or left out together form a group: the output channels of one layer are the input
channels of the next, and layers joined by an addition share theirs. A `ChannelMap` says which groups lie along
each axis of each tensor. With a `SubModel` it gives each tensor's coverage.

A model with early exits is a row of blocks. A sub-model of depth k has the first k, and their exits: DepthFL (Kim
et al., ICLR 2023). The directions of an adapter (LoRA) are a group of their own kind: a sub-model of rank r has
the first r of each.

The rule: the coverage is the same on any machine and with any version of numpy. So only the few numbers of the
`SubModel` travel and are stored.

prefix    the first channels: HeteroFL (arXiv 2010.01264)
rolling   a window that moves by one channel each round and wraps around: FedRolex (arXiv 2212.01548)
random    drawn again each round: Federated Dropout (arXiv 1812.07210)
magnitude those with the largest weights: structured pruning (arXiv 1608.08710)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from fedgrpc.errors import LayoutError, UsageError
from fedgrpc.submodels.coverage import Coverage
from fedgrpc.submodels.layer_cost import LayerCost, check_costs

_MAX_TEXT_CHARS = 100
MOST_BLOCKS = 1 << 16
RULES = ("prefix", "rolling", "random", "magnitude")


@dataclass(frozen=True)
class ChannelGroup:
    """`channels` that are kept or left out together wherever they appear.

    The channels lie in `blocks` equal blocks, such as the groups of a GroupNorm. A sub-model keeps equally many
    of each. A `rank` is cut by the sub-model's rank, whatever its width.
    """

    channels: int
    blocks: int = 1
    rank: bool = False


@dataclass(frozen=True)
class Segment:
    """Stretch of an axis: `repeat` elements for each channel of `group`, or `repeat` elements always kept."""

    group: int | None
    repeat: int = 1


Axis = tuple[Segment, ...]


@dataclass(frozen=True)
class SubModel:
    """Width, above 0 to 1, and the rule that chooses channels; number of blocks and of directions (0: all).

    `round` moves the channels or draws new ones.
    """

    width: float = 1.0
    rule: str = "prefix"
    round: int = 0
    depth: int = 0
    rank: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.width <= 1:
            raise UsageError(f"a sub-model's width is above 0 to 1, not {self.width:g}")
        if self.rule not in RULES:
            raise UsageError(f"no rule {self.rule!r} for sub-models; there are {', '.join(RULES)}")
        if not 0 <= self.round < 1 << 62:
            raise UsageError(f"a round counts from 0 to 2**62, not {self.round}")
        for name in _COUNTS:
            if not 0 <= getattr(self, name) <= MOST_BLOCKS:
                raise UsageError(f"a sub-model's {name} is 1 to {MOST_BLOCKS}, or 0 for all of it")

    @property
    def whole(self) -> bool:
        """True if this is the whole model."""
        return self.width == 1.0 and not self.depth and not self.rank

    @property
    def name(self) -> str:
        """Name on the wire and in records; "" is the whole model."""
        return "" if self.whole else str(self)

    @property
    def moves(self) -> bool:
        """True if the channels may change from round to round."""
        return self.rule != "prefix" and self.width < 1

    @classmethod
    def parse(cls, text: str) -> SubModel:
        """Parse what `str` gives: "prefix:0.5", "rolling:12:0.5", "prefix:1.0:depth=2"; "" is the whole model.

        Raises UsageError.
        """
        if text in ("", "whole"):
            return cls()
        if len(text) > _MAX_TEXT_CHARS:
            raise UsageError(f"{len(text)} characters are no sub-model; one looks like rolling:12:0.5")
        rule, *rest = text.split(":")
        try:
            counts = dict(each.split("=") for each in rest if "=" in each)
            *rounds, width = (each for each in rest if "=" not in each)
            if not counts.keys() <= set(_COUNTS):
                raise ValueError
            return cls(
                float(width),
                rule,
                int(rounds[0]) if rounds else 0,
                **{name: int(count) for name, count in counts.items()},
            )
        except ValueError as error:
            raise UsageError(f"{text!r} is no sub-model; one looks like prefix:0.5 or rolling:12:0.5") from error

    def __str__(self) -> str:
        """Text that two sub-models share only if they have the same channels and blocks."""
        if self.whole:
            return "whole"
        moving = f":{self.round}" if self.rule in ("rolling", "random") and self.moves else ""
        counts = "".join(f":{name}={count}" for name in _COUNTS if (count := getattr(self, name)))
        return f"{self.rule}{moving}:{self.width!r}{counts}"


_COUNTS = ("depth", "rank")


@dataclass(frozen=True)
class ChannelMap:
    """Channel groups, and the axes of each tensor with channels. Other tensors keep their full width.

    `blocks` has the number of each tensor's block, from 1. Tensors without one are in every sub-model. `costs` are
    those of the model's layers, in the order in which they run; empty: they are not known.
    """

    groups: tuple[ChannelGroup, ...]
    tensors: Mapping[str, tuple[Axis, ...]]
    blocks: Mapping[str, int] = field(default_factory=dict)
    costs: tuple[LayerCost, ...] = ()

    @property
    def depth(self) -> int:
        """Number of blocks; 0: the model has none."""
        return max(self.blocks.values(), default=0)

    @property
    def rank(self) -> int:
        """Most directions of an adapter; 0: the model has none."""
        return max((group.channels for group in self.groups if group.rank), default=0)

    def validate(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check a map from the wire against a model of these shapes. Raises LayoutError."""
        for group in self.groups:
            if group.channels < 1 or group.blocks < 1 or group.channels % group.blocks:
                raise LayoutError(f"{group.channels} channels do not fall into {group.blocks} blocks")
        for name, axes in self.tensors.items():
            if name not in shapes or len(axes) != len(shapes[name]):
                raise LayoutError(f"the model has no tensor {name!r} of {len(axes)} axes")
            for place, (axis, extent) in enumerate(zip(axes, shapes[name], strict=True)):
                if self._extent(axis, extent) != extent:
                    raise LayoutError(
                        f"the channels of axis {place} of {name!r} do not take its {extent} elements"
                    )
        for name, number in self.blocks.items():
            if name not in shapes or not 1 <= number <= MOST_BLOCKS:
                raise LayoutError(f"the model has no tensor {name!r} of block {number}")
        check_costs(self.costs, shapes)
        # The extents of the axes bound the sizes of used groups. Nothing would bound an unused one.
        if unused := set(range(len(self.groups))) - self._used():
            raise LayoutError(f"no tensor has channels of group {min(unused)}")

    def _used(self) -> set[int]:
        return {
            segment.group
            for axes in self.tensors.values()
            for axis in axes
            for segment in axis
            if segment.group is not None
        }

    def _extent(self, axis: Axis, limit: int) -> int:
        total = 0
        for segment in axis:
            if segment.repeat < 1 or not (segment.group is None or 0 <= segment.group < len(self.groups)):
                return -1
            total += segment.repeat * (1 if segment.group is None else self.groups[segment.group].channels)
            if total > limit:
                return -1
        return total

    def select(self, sub_model: SubModel, weights: Mapping[str, np.ndarray] | None = None) -> KeptChannels:
        """Choose the sub-model's channels. The rule "magnitude" needs the whole model's weights."""
        if sub_model.rule == "magnitude" and not sub_model.whole and weights is None:
            raise ValueError("channels are chosen by magnitude where the weights are known")
        return KeptChannels(self, sub_model, weights)

    def norms(self, number: int, weights: Mapping[str, np.ndarray]) -> np.ndarray:
        """Sum the squares of the weights that compute each channel of a group (axis 0), float64 [channels]."""
        total = np.zeros(self.groups[number].channels)
        for name, axes in self.tensors.items():
            if axes and axes[0] and len(axes) > 1 and axes[0][0].group == number and len(axes[0]) == 1:
                rows = weights[name].reshape(len(total), -1).astype(np.float64)
                total += np.einsum("ij,ij->i", rows, rows)
        return total


class KeptChannels:
    """Channels that one sub-model keeps of each group, and so its coverage of every tensor that it has."""

    def __init__(
        self, channel_map: ChannelMap, sub_model: SubModel, weights: Mapping[str, np.ndarray] | None = None
    ) -> None:
        self._map = channel_map
        self._sub_model = sub_model
        self._weights = weights

    @cached_property
    def kept(self) -> tuple[np.ndarray, ...]:
        """Increasing channels (int64) of each group."""
        kept = []
        for number, group in enumerate(self._map.groups):
            norms = None
            if self._sub_model.rule == "magnitude" and self._weights is not None:
                norms = self._map.norms(number, self._weights)
            kept.append(kept_channels(group, self._sub_model, number, norms))
        return tuple(kept)

    def has(self, name: str) -> bool:
        """Return whether the sub-model has the tensor: its block is not too deep."""
        return not self._sub_model.depth or self._map.blocks.get(name, 0) <= self._sub_model.depth

    def coverage(self, name: str, shape: tuple[int, ...]) -> Coverage:
        """Return the sub-model's coverage of the tensor `name`, which has `shape` in the whole model."""
        axes = self._map.tensors.get(name)
        if axes is None or self._sub_model.whole:
            return Coverage(shape)
        return Coverage(shape, tuple(self._positions(axis) for axis in axes))

    def _positions(self, axis: Axis) -> np.ndarray | None:
        if all(segment.group is None or self._all_kept(segment.group) for segment in axis):
            return None
        parts, start = [], 0
        for segment in axis:
            if segment.group is None:
                parts.append(np.arange(start, start + segment.repeat))
                start += segment.repeat
            else:
                first = start + self.kept[segment.group] * segment.repeat
                parts.append((first[:, None] + np.arange(segment.repeat)).reshape(-1))
                start += self._map.groups[segment.group].channels * segment.repeat
        return np.concatenate(parts)

    def _all_kept(self, group: int) -> bool:
        return len(self.kept[group]) == self._map.groups[group].channels


def kept_channels(
    group: ChannelGroup, sub_model: SubModel, number: int, norms: np.ndarray | None = None
) -> np.ndarray:
    """Choose increasing channels of `group`, the `number`-th of its model; at least one of each block."""
    if group.rank:
        return np.arange(min(group.channels, sub_model.rank or group.channels), dtype=np.int64)
    size = group.channels // group.blocks
    # Without the small difference, 0.55 * 100 would round up to 56, as floating point gives 55.00000000000001.
    count = max(1, math.ceil(sub_model.width * size - 1e-9))
    starts = np.arange(group.blocks)[:, None] * size
    if norms is not None:
        within = np.argsort(-norms.reshape(group.blocks, size), axis=1, kind="stable")[:, :count]
    elif sub_model.rule == "rolling":
        within = (sub_model.round + np.arange(count)) % size
    elif sub_model.rule == "random":
        within = _ranked(size, f"{sub_model.round}/{number}")[:count]
    else:
        within = np.arange(count)
    return np.sort((starts + within).reshape(-1)).astype(np.int64)


def _ranked(size: int, seed: str) -> np.ndarray:
    """Return a permutation that depends only on the seed, since numpy's own may change with its version."""
    digest = hashlib.shake_256(seed.encode()).digest(8 * size)
    return np.argsort(np.frombuffer(digest, "<u8"), kind="stable")


def sub_shapes(selection: KeptChannels, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a sub-model's tensors, by name."""
    return {
        name: selection.coverage(name, shape).sub_shape for name, shape in shapes.items() if selection.has(name)
    }
