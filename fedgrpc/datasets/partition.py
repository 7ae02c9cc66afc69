"""Partitions of one data set among workers, to study the effect of federated data on training.

The rule: parts are disjoint and together they are everything. The same seed gives the same parts on every device.
The random properties of a part (its mix of labels, its size) are drawn before any example. So the training and
the held-out set, split with one seed, give each part the same mix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Final, Protocol, TypeVar

import numpy as np

from fedgrpc.errors import UsageError
from fedgrpc.plugins import make

MINIMUM_PART_SIZE = 10
_BRIGHTEST: Final = 255
PARTITIONS: Final = "iid, dirichlet:0.5, shards:2, labels:2, quantity:0.5, noise:0.1 or groups"
"""Examples of what `parse_partition` accepts, for messages."""
KINDS: Final = ("iid", "dirichlet", "shards", "labels", "quantity", "noise", "groups")

N = TypeVar("N", int, float)


class Partition(Protocol):
    """Rule that splits examples into parts. `by_label`: it depends on the labels, not only on their number.

    `by_group`: in place of labels it wants the group of each example, such as its writer.
    """

    @property
    def by_label(self) -> bool: ...
    @property
    def by_group(self) -> bool: ...

    def split(self, labels: np.ndarray, parts: int, seed: int) -> list[np.ndarray]:
        """Return indices into `labels` (int64, ascending) of each of `parts` parts.

        Every part gets at least `MINIMUM_PART_SIZE` examples, or an even share where there are too few.

        Raises:
            UsageError: there are fewer examples than parts.
        """
        ...


@dataclass(frozen=True)
class Iid:
    """Every part is an equal, uniform sample."""

    by_label: ClassVar[bool] = False
    by_group: ClassVar[bool] = False

    def split(self, labels: np.ndarray, parts: int, seed: int) -> list[np.ndarray]:
        """Split as `Partition.split`."""
        _check_parts(labels, parts)
        order = np.random.default_rng(seed).permutation(len(labels))
        return [np.sort(part) for part in np.array_split(order, parts)]


@dataclass(frozen=True)
class Dirichlet:
    """Label skew: each label's examples are dealt in proportions from Dir(alpha).

    As in NIID-Bench (arXiv 2102.02079), a part that already holds its even share gets no further labels.
    """

    alpha: float
    by_label: ClassVar[bool] = True
    by_group: ClassVar[bool] = False

    def split(self, labels: np.ndarray, parts: int, seed: int) -> list[np.ndarray]:
        """Split as `Partition.split`."""
        _check(labels, parts)
        rng = np.random.default_rng(seed)
        classes, of_example = np.unique(labels, return_inverse=True)
        proportions = rng.dirichlet(np.full(parts, self.alpha), size=len(classes))
        held: list[list[np.ndarray]] = [[] for _ in range(parts)]
        sizes = np.zeros(parts, dtype=np.int64)
        for label in range(len(classes)):
            examples = rng.permutation(np.flatnonzero(of_example == label))
            open_share = _normalized(proportions[label] * (sizes < len(labels) / parts))
            for part, piece in enumerate(_deal(examples, open_share)):
                held[part].append(piece)
                sizes[part] += len(piece)
        return _with_minimum([np.concatenate(pieces) for pieces in held], rng)


@dataclass(frozen=True)
class LabelShards:
    """Label skew: the examples, sorted by label, are cut into equal shards; each part is dealt a few.

    The pathological split of McMahan et al. (arXiv 1602.05629). All parts have one size; a part that is dealt two
    shards of one label has fewer labels than shards.
    """

    shards_per_part: int
    by_label: ClassVar[bool] = True
    by_group: ClassVar[bool] = False

    def split(self, labels: np.ndarray, parts: int, seed: int) -> list[np.ndarray]:
        """Split as `Partition.split`."""
        _check(labels, parts)
        count = parts * self.shards_per_part
        if len(labels) < count:
            raise UsageError(f"{len(labels)} examples cannot be cut into {count} shards")
        rng = np.random.default_rng(seed)
        dealt = rng.permutation(count).reshape(parts, self.shards_per_part)
        shuffled = rng.permutation(len(labels))
        shards = np.array_split(shuffled[np.argsort(labels[shuffled], kind="stable")], count)
        return [np.sort(np.concatenate([shards[index] for index in part])) for part in dealt]


@dataclass(frozen=True)
class LabelsPerPart:
    """Label skew: each part has a few labels; the parts that have a label share its examples evenly.

    The #C=k of NIID-Bench (arXiv 2102.02079): part i has label i and k-1 random others, so that sizes differ. With
    fewer parts than labels, a label that nobody drew goes to a part by lot: nothing is left out.
    """

    labels_per_part: int
    by_label: ClassVar[bool] = True
    by_group: ClassVar[bool] = False

    def split(self, labels: np.ndarray, parts: int, seed: int) -> list[np.ndarray]:
        """Split as `Partition.split`."""
        _check(labels, parts)
        rng = np.random.default_rng(seed)
        classes, of_example = np.unique(labels, return_inverse=True)
        owners = self._owners(len(classes), parts, rng)
        held: list[list[np.ndarray]] = [[] for _ in range(parts)]
        for label, having in enumerate(owners):
            examples = rng.permutation(np.flatnonzero(of_example == label))
            for part, piece in zip(having, np.array_split(examples, len(having)), strict=True):
                held[part].append(piece)
        return _with_minimum([_joined(pieces) for pieces in held], rng)

    def _owners(self, classes: int, parts: int, rng: np.random.Generator) -> list[list[int]]:
        """Choose the parts that have each label."""
        owners: list[list[int]] = [[] for _ in range(classes)]
        for part in range(parts):
            own = part % classes
            others = np.delete(np.arange(classes), own)
            drawn = rng.choice(others, min(self.labels_per_part - 1, classes - 1), replace=False)
            for label in (own, *drawn):
                owners[label].append(part)
        return [having or [int(rng.integers(parts))] for having in owners]


@dataclass(frozen=True)
class QuantitySkew:
    """Parts are uniform samples whose sizes come from Dir(alpha), as in NIID-Bench (arXiv 2102.02079)."""

    alpha: float
    by_label: ClassVar[bool] = False
    by_group: ClassVar[bool] = False

    def split(self, labels: np.ndarray, parts: int, seed: int) -> list[np.ndarray]:
        """Split as `Partition.split`."""
        _check_parts(labels, parts)
        rng = np.random.default_rng(seed)
        proportions = _normalized(rng.dirichlet(np.full(parts, self.alpha)))
        return _with_minimum(_deal(rng.permutation(len(labels)), proportions), rng)


@dataclass(frozen=True)
class FeatureNoise(Iid):
    """Feature skew: uniform parts, of which each has more noise in its inputs than the one before.

    As in NIID-Bench (arXiv 2102.02079): part i of n, from 0, has Gaussian noise of the deviation
    level * i / (n - 1), where inputs are from 0 to 1. The held-out examples stay clean.
    """

    level: float

    def noisy(self, inputs: np.ndarray, index: int, parts: int, seed: int) -> np.ndarray:
        """Return the training inputs of part `index` with its noise, in their dtype.

        Pixels of whole numbers are taken as 0 to 255, and rounded and kept there.
        """
        deviation = self.level * index / max(1, parts - 1)
        if not deviation or not inputs.size:
            return inputs
        noise = np.random.default_rng((seed, index)).normal(0.0, deviation, inputs.shape)
        if inputs.dtype.kind == "f":
            return np.asarray(inputs + noise, inputs.dtype)
        return np.asarray(np.clip(np.rint(inputs + _BRIGHTEST * noise), 0, _BRIGHTEST), inputs.dtype)


@dataclass(frozen=True)
class ByGroup:
    """Every part has whole groups, such as all images of a few writers; each part has as many, or one more.

    The "real-world" partition of NIID-Bench (arXiv 2102.02079), which deals FEMNIST's writers.
    """

    by_label: ClassVar[bool] = False
    by_group: ClassVar[bool] = True

    def split(self, labels: np.ndarray, parts: int, seed: int) -> list[np.ndarray]:
        """Split as `Partition.split`; `labels` has the group of each example."""
        _check(labels, parts)
        groups, of_example = np.unique(labels, return_inverse=True)
        if len(groups) < parts:
            raise UsageError(f"{len(groups)} groups cannot be shared out among {parts} parts")
        dealt = np.array_split(np.random.default_rng(seed).permutation(len(groups)), parts)
        return [np.flatnonzero(np.isin(of_example, own)) for own in dealt]


@lru_cache(maxsize=16)
def parse_partition(text: str) -> Partition:
    """Parse `iid`, `dirichlet:ALPHA`, `shards:N`, `labels:N`, `quantity:ALPHA`, `noise:LEVEL` or `groups`.

    Raises:
        UsageError: it is none of these and no plugin, or its number is not positive.
    """
    kind, _, argument = text.partition(":")
    if text == "iid":
        return Iid()
    if text == "groups":
        return ByGroup()
    if kind == "noise":
        return FeatureNoise(_positive(text, argument, float))
    if kind == "dirichlet":
        return Dirichlet(_positive(text, argument, float))
    if kind == "shards":
        return LabelShards(_positive(text, argument, int))
    if kind == "labels":
        return LabelsPerPart(_positive(text, argument, int))
    if kind == "quantity":
        return QuantitySkew(_positive(text, argument, float))
    return _plugin(text)


def _plugin(text: str) -> Partition:
    try:
        made = make("partition", text, {})
    except UsageError as error:
        raise UsageError(f"partition {text!r} must be {PARTITIONS}, or a plugin: {error}") from None
    if not all(hasattr(made, name) for name in ("split", "by_label", "by_group")):
        raise UsageError(f"partition {text}: the class has no split(), by_label or by_group")
    partition: Partition = made
    return partition


def parse_part(text: str) -> tuple[int, int]:
    """Parse `3/10`, the third of ten parts, as (index from 0, parts).

    Raises:
        UsageError: the text has another form, or there is no such part.
    """
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise UsageError(f"part {text!r} must look like 3/10 and lie between 1/10 and 10/10")
    return int(number) - 1, int(parts)


def _positive(text: str, argument: str, kind: Callable[[str], N]) -> N:
    try:
        value = kind(argument)
    except ValueError:
        raise UsageError(f"partition {text!r} needs a number after the colon") from None
    if not 0 < value < float("inf"):
        raise UsageError(f"partition {text!r} needs a positive number after the colon")
    return value


def _check(labels: np.ndarray, parts: int) -> None:
    if labels.ndim != 1:
        raise UsageError(
            f"a partition needs one label per example, not labels of shape {labels.shape}; iid needs none"
        )
    _check_parts(labels, parts)


def _check_parts(labels: np.ndarray, parts: int) -> None:
    if parts < 1:
        raise UsageError(f"cannot share out among {parts} parts")
    if len(labels) < parts:
        raise UsageError(f"{len(labels)} examples cannot be shared out among {parts} parts")


def _normalized(weights: np.ndarray) -> np.ndarray:
    """Scale weights to a sum of one. All zero, as a tiny alpha underflows, become even ones."""
    total = weights.sum()
    return weights / total if total > 0 else np.full(len(weights), 1 / len(weights))


def _joined(pieces: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *pieces])


def _deal(examples: np.ndarray, proportions: np.ndarray) -> list[np.ndarray]:
    cuts = np.round(np.cumsum(proportions)[:-1] * len(examples)).astype(np.int64)
    return np.split(examples, cuts)


def _with_minimum(parts: list[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    """Move examples from the largest part to those that are too small. NIID-Bench draws again instead."""
    minimum = min(MINIMUM_PART_SIZE, sum(map(len, parts)) // len(parts))
    parts = [rng.permutation(part) for part in parts]
    for index in range(len(parts)):
        while len(parts[index]) < minimum:
            largest = max(range(len(parts)), key=lambda i: len(parts[i]))
            wanted = min(minimum - len(parts[index]), len(parts[largest]) - minimum)
            parts[index] = np.concatenate([parts[index], parts[largest][:wanted]])
            parts[largest] = parts[largest][wanted:]
    return [np.sort(part) for part in parts]
