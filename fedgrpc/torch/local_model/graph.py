"""Graph of channels: which channels lie along the axes of every tensor of a forward pass, and the channel map.

Each axis of each tensor is a row of segments, (node, repeat): the channels of a node, each of `repeat` elements.
Operations join nodes (an addition), lengthen rows (a concatenation), or freeze nodes at their full width (anything
unknown).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor, nn

from fedgrpc.submodels.channels import Axis, ChannelGroup, ChannelMap, Segment

OUTPUT: Final = "it is the model's output"


@dataclass(frozen=True)
class Channels:
    """Channel groups of a model, and the reason for each tensor with an axis that keeps its full width."""

    map: ChannelMap
    full_width: Mapping[str, str]

    @property
    def by_reason(self) -> list[tuple[list[str], str]]:
        """Tensors of `full_width`, grouped by reason, without those that lead to the model's output."""
        reasons = dict.fromkeys(reason for reason in self.full_width.values() if reason != OUTPUT)
        return [([name for name, why in self.full_width.items() if why == reason], reason) for reason in reasons]


@dataclass
class Node:
    """Channels that are kept or left out together. After a join, `into` leads to the node that represents both."""

    channels: int
    blocks: int = 1
    frozen: str = ""
    into: Node | None = None

    def root(self) -> Node:
        node = self
        while node.into is not None:
            node = node.into
        return node


Row = tuple[tuple[Node, int], ...]  # the segments of one axis
Axes = tuple[Row | None, ...]  # None: no channels lie along it


class Graph:
    """Known axes of every tensor seen so far."""

    def __init__(self, module: nn.Module) -> None:
        self.names: dict[int, str] = {}
        for name, tensor in module.state_dict(keep_vars=True).items():
            # Of a tied tensor the name that sorts first, under which its weights cross.
            self.names[id(tensor)] = min(name, self.names.get(id(tensor), name))
        self._known: dict[int, tuple[Tensor, Axes]] = {}
        self._unknown: dict[str, str] = {}

    def axes(self, tensor: Tensor) -> Axes:
        known = self._known.get(id(tensor))
        return (None,) * tensor.dim() if known is None else known[1]

    def is_state(self, tensor: object) -> bool:
        return id(tensor) in self.names

    def set(self, tensor: Tensor, axes: Sequence[Row | None]) -> None:
        """Record the axes of a tensor. The graph keeps the tensor alive, so that no other gets its id."""
        self._known[id(tensor)] = (tensor, tuple(axes))

    def state(self, tensor: Tensor | None, axes: Sequence[Row | None]) -> None:
        """Record the axes with which a parameter or buffer is used. Axes of a second use are joined."""
        if tensor is None:
            return
        if id(tensor) in self._known:
            axes = [self.join(mine, theirs) for mine, theirs in zip(self.axes(tensor), axes, strict=True)]
        self.set(tensor, axes)

    def freeze_state(self, tensor: Tensor, reason: str) -> None:
        """Keep the full width of a parameter or buffer that an unknown operation uses."""
        self.state(tensor, [None] * tensor.dim())
        self._unknown.setdefault(self.names[id(tensor)], reason)

    def fresh(self, channels: int) -> Row:
        return ((Node(channels), 1),)

    def join(self, left: Row | None, right: Row | None) -> Row | None:
        """Join two rows that lie along one axis."""
        if left is None or right is None:
            self.freeze_row(left or right, "it meets an axis without known channels")
            return None
        same = len(left) == len(right) and all(
            a.root().channels == b.root().channels and m == n for (a, m), (b, n) in zip(left, right, strict=True)
        )
        if not same:
            for row in (left, right):
                self.freeze_row(row, "channels of different layouts are joined")
            return left
        for (a, _), (b, _) in zip(left, right, strict=True):
            self._merge(a.root(), b.root())
        return left

    def _merge(self, a: Node, b: Node) -> None:
        if a is b:
            return
        a.blocks = math.lcm(a.blocks, b.blocks)
        a.frozen = a.frozen or b.frozen
        b.into = a

    def freeze(self, axes: Axes, reason: str) -> None:
        for row in axes:
            self.freeze_row(row, reason)

    def freeze_row(self, row: Row | None, reason: str) -> None:
        for node, _ in row or ():
            node.root().frozen = node.root().frozen or reason

    def channels(self) -> Channels:
        numbers: dict[int, int] = {}
        groups: list[ChannelGroup] = []
        tensors: dict[str, tuple[Axis, ...]] = {}
        full_width: dict[str, str] = dict(self._unknown)

        def segment(node: Node, repeat: int, name: str) -> Segment:
            root = node.root()
            if root.frozen:
                full_width.setdefault(name, root.frozen)
                return Segment(None, root.channels * repeat)
            if id(root) not in numbers:
                numbers[id(root)] = len(groups)
                groups.append(ChannelGroup(root.channels, root.blocks))
            return Segment(numbers[id(root)], repeat)

        for place, name in self.names.items():
            if place not in self._known:
                continue
            tensor, axes = self._known[place]
            rows: list[Axis] = []
            for row, extent in zip(axes, tensor.shape, strict=True):
                known = (Segment(None, extent),) if row is None else tuple(segment(*each, name) for each in row)
                rows.append(known)
            if any(each.group is not None for row in rows for each in row):
                tensors[name] = tuple(rows)
        return Channels(ChannelMap(tuple(groups), tensors), full_width)
