"""Companion tensors of a model: adding them to a first model, and taking a version with them apart.

    NAME          a trained tensor of the learning task's model
    NAME#control  its companion: same shape and dtype, role "parameter", behind all tensors of the model

The rule: views, not copies. A device that reads one tensor at a time goes on doing so.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from fedgrpc.algorithms.algorithm import Algorithm, Received, Sent, Weights
from fedgrpc.codec.layout import Layout, TensorSpec, told_layout
from fedgrpc.errors import UsageError

MARK: Final = "#"


def suffix_of(name: str, suffixes: Collection[str]) -> str:
    """Return the suffix of a companion's name; "" of a tensor that is the model's own."""
    start = name.rfind(MARK) if suffixes else 0
    return name[start:] if start > 0 and name[start:] in suffixes else ""


def trained_names(weights: Weights) -> list[str]:
    """Return the names of the tensors that are trained."""
    return [spec.name for spec in told_layout(weights) if spec.is_trained]


@dataclass(frozen=True)
class Companion:
    """A companion tensor: its spec, its suffix, and the name of the tensor that it goes with."""

    spec: TensorSpec
    suffix: str
    name: str


def companions_of(algorithm: Algorithm, layout: Layout) -> list[Companion]:
    """Return the companions that a model of that layout gets, in the order in which they follow it."""
    return [
        Companion(TensorSpec(spec.name + suffix, spec.dtype, spec.shape), suffix, spec.name)
        for suffix in algorithm.companions
        for spec in layout
        if spec.is_trained
    ]


def first_values(algorithm: Algorithm, companion: Companion, weights: np.ndarray) -> np.ndarray:
    """Return what a companion starts as; `weights` are those of its tensor in the first model."""
    values = algorithm.first_companion(companion.suffix, companion.name, weights)
    return np.asarray(values, companion.spec.numpy_dtype)


def with_companions(algorithm: Algorithm, weights: Weights, layout: Layout) -> tuple[Weights, Layout]:
    """Return a first model with the companions that the algorithm starts from, and its layout."""
    found = companions_of(algorithm, layout)
    if not found:
        return weights, layout
    added = {each.spec.name: first_values(algorithm, each, weights[each.name]) for each in found}
    return {**weights, **added}, (*layout, *(each.spec for each in found))


class Renamed(Mapping[str, np.ndarray]):
    """Tensors of `source` under other names, read on access; `names` has the source's name of each."""

    def __init__(self, source: Weights, names: Mapping[str, str]) -> None:
        self._source = source
        self._names = names
        told: Layout | None = getattr(source, "layout", None)
        if told is not None:
            by_name = {spec.name: spec for spec in told}
            self.layout = tuple(_called(by_name[old], new) for new, old in names.items())

    def __getitem__(self, name: str) -> np.ndarray:
        return self._source[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _called(spec: TensorSpec, name: str) -> TensorSpec:
    return spec if spec.name == name else TensorSpec(name, spec.dtype, spec.shape, spec.role)


def received(algorithm: Algorithm, version: Weights, kept: Weights) -> Received:
    """Take a version apart into the model's own tensors and the companions, by suffix.

    Raises `UsageError` for a version without companions that the algorithm has.
    """
    names: dict[str, dict[str, str]] = {"": {}, **{suffix: {} for suffix in algorithm.companions}}
    for name in version:
        suffix = suffix_of(name, algorithm.companions)
        names[suffix][name.removesuffix(suffix)] = name
    for suffix in algorithm.companions:
        if not names[suffix]:
            raise UsageError(f"the model has no {suffix} tensors: the run began with another algorithm")
    views = {suffix: Renamed(version, each) for suffix, each in names.items()}
    return Received(views.pop("") if algorithm.companions else version, views, kept)


def joined(algorithm: Algorithm, version: Weights, sent: Sent) -> Weights:
    """Return the new values of all tensors of a version. Companions that are not sent stay."""
    if not algorithm.companions:
        return sent.weights
    values = dict(sent.weights)
    for name in version:
        if suffix := suffix_of(name, algorithm.companions):
            new, own = sent.companions.get(suffix, {}), name.removesuffix(suffix)
            values[name] = new[own] if own in new else version[name]
    return values
