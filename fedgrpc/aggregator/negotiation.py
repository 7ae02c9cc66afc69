"""Recipes of each worker's models and updates: by what the run prefers, what they list, and their links.

The rule: nothing is assumed of a worker. It is told recipes of encodings that it has listed, and refused where
there is none. How fast its link is its own transfers have told, or it has declared. The price of a pruned or
clustered model is that of the recipe that really writes it, for a tensor of normal values.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from io import BytesIO
from typing import Final

import numpy as np

from fedgrpc.aggregator.registry import Worker
from fedgrpc.codec.cast import Cast
from fedgrpc.codec.codebook import Codebook
from fedgrpc.codec.encoding import Encoding
from fedgrpc.codec.layout import TensorSpec, spec_of
from fedgrpc.codec.payload import write_payload
from fedgrpc.codec.preference import Capabilities, Preferences, parse_preferences
from fedgrpc.codec.raw import Raw
from fedgrpc.codec.recipe import Recipe
from fedgrpc.codec.sparse import Threshold
from fedgrpc.codec.uniform import Uniform
from fedgrpc.errors import UsageError
from fedgrpc.rounds.history import WorkerHistory
from fedgrpc.runs.task_context import Agreed, Downlink
from fedgrpc.submodels.plan import LocalModelPlan
from fedgrpc.submodels.reduction import ReducedTensors, Reduction
from fedgrpc.v1.aggregator_pb2 import RegisterRequest, WorkerRecord
from fedgrpc.v1.tensor_pb2 import COMPRESSION_ZSTD

AUTO = "auto"
AUTO_UPLOAD = "entropy:c=8+zstd below 2mbit | entropy:c=3+zstd below 20mbit | int8+zstd | int8 | raw"
AUTO_DOWNLOAD = "int8+zstd | int8 | raw"
AUTO_DIFFERENCE = "entropy:c=1+zstd below 20mbit | int8+zstd | int8 | raw"
_LEAST_BITS = 8
RAW = Recipe.parse("raw")
# Encodings of reduced models.
_REDUCED = frozenset({"codebook", "threshold"})
# Of a tensor's RMS: what is below is as good as zero.
_ANYTHING: Final = 1e-6
# Pruning ratio from which marks pay: `tools.bench.reduced_bytes`.
_MARKS_PAY: Final = 0.6
# Elements whose bits tell what those of a larger tensor take.
_SAMPLE: Final = 1 << 16
# Different lists of encodings that are read once.
_LISTS: Final = 256


@dataclass(frozen=True)
class LinkSpeed:
    """Bytes a second up and down; None: unknown."""

    up: float | None
    down: float | None


def link_of(worker: Worker, history: WorkerHistory) -> LinkSpeed:
    """Return the worker's link, by what went through it, else by what the worker declares."""
    device = worker.registration.device
    return LinkSpeed(
        history.uplink.bytes_per_second or device.uplink_bits_per_second / 8 or None,
        history.downlink.bytes_per_second or device.downlink_bits_per_second / 8 or None,
    )


class Negotiation:
    """The preferences of one run, each as `parse_preferences` reads it, or "auto".

    Raises UsageError for one that cannot be, and for a difference that may lose more than there is.
    """

    def __init__(self, download: str, difference: str | None, upload: str) -> None:
        self._upload = _preferences(upload, AUTO_UPLOAD)
        self._whole = _preferences(download, AUTO_DOWNLOAD)
        if difference is None and download.strip() == AUTO:
            difference = AUTO
        self._difference = None if difference is None else _preferences(difference, AUTO_DIFFERENCE)
        # The thousands of a fleet list the same, and are checked at every poll.
        self._lacking = lru_cache(maxsize=_LISTS)(self._lacking_of)
        self.downlinks = tuple(dict.fromkeys(self._downlinks()))
        for recipe in self._difference.recipes if self._difference else ():
            if not recipe.contractive:
                raise UsageError(
                    f"difference_recipe '{recipe}' may lose more than there is: errors would grow; "
                    "take a finer one, such as entropy:c=1+zstd"
                )
        for downlink in self.downlinks:
            if any(recipe is not None and recipe.budget for recipe in (downlink.whole, downlink.difference)):
                raise UsageError("a budget is for updates: a model is encoded once for everybody")
        for recipe in self._whole.recipes:
            if not all(map(_is_fine, recipe.encodings)):
                raise UsageError(
                    f"'{recipe}' is too coarse for whole models: nothing makes good what they lose. "
                    f"Use it for updates, as in --upload-encoding '{recipe}' --download-encoding int8+zstd"
                )

    def _downlinks(self) -> Iterator[Downlink]:
        """Yield all recipes that may be agreed on."""
        for whole in self._whole.recipes:
            for difference in (whole,) if self._difference is None else self._difference.recipes:
                yield Downlink.of(whole, difference)

    def check(self, registration: RegisterRequest) -> None:
        """Raise UsageError where this run has no recipe that the worker knows."""
        known = _known(registration)
        if lacking := self._lacking(known):
            raise UsageError(f"worker {registration.worker!r} knows no encoding of this run's {lacking}")

    def _lacking_of(self, known: Capabilities) -> str:
        """Say of what there is no recipe, and what there is; "": there is one of everything."""
        for preferences, what in (
            (self._whole, "models"),
            (self._difference, "models"),
            (self._upload, "updates"),
        ):
            if preferences is not None and preferences.choose(known, None) is None:
                recipes = " | ".join(str(recipe) for recipe in preferences.recipes)
                return f"{what}, {recipes}; it lists {known}"
        return ""

    def agreed(self, worker: Worker, history: WorkerHistory) -> Agreed:
        """Return the recipes for a worker. Raises UsageError as `check`."""
        self.check(worker.registration)
        known, link = _known(worker.registration), link_of(worker, history)
        up, down = (None if rate is None else 8 * rate for rate in (link.up, link.down))
        upload, whole = self._upload.choose(known, up), self._whole.choose(known, down)
        difference = whole if self._difference is None else self._difference.choose(known, down)
        assert upload is not None
        assert whole is not None
        assert difference is not None
        return Agreed(Downlink.of(whole, difference), upload)

    def tell(self, worker: Worker, history: WorkerHistory, record: WorkerRecord) -> None:
        """Fill in what operators see of it."""
        link = link_of(worker, history)
        record.uplink_bytes_per_second, record.downlink_bytes_per_second = link.up or 0.0, link.down or 0.0
        try:
            agreed = self.agreed(worker, history)
        except UsageError:
            # A worker may have registered when this run had other encodings, and not come back yet.
            return
        record.download_recipe, record.upload_recipe = str(agreed.downlink.whole), str(agreed.upload)
        record.difference_recipe = str(agreed.downlink.difference or RAW)


def reduction_for(worker: Worker, plan: LocalModelPlan) -> Reduction:
    """Return the part of a model that need not travel to a worker with this plan; none if it cannot do without."""
    return Reduction.of(plan) if reads_reduced(worker) and not worker.leads else Reduction()


def reads_reduced(worker: Worker) -> bool:
    """Return whether the worker can read reduced models."""
    return set(worker.registration.encodings) >= _REDUCED


def _is_fine(encoding: Encoding) -> bool:
    """Return whether a whole model in this encoding is still the model: no coarser than int8."""
    if isinstance(encoding, Uniform):
        return encoding.bits >= _LEAST_BITS
    return encoding.lossless or isinstance(encoding, Cast)


def _preferences(text: str, auto: str) -> Preferences:
    return parse_preferences(auto if text.strip() == AUTO else text)


def _known(registration: RegisterRequest) -> Capabilities:
    return _listed(tuple(registration.encodings), COMPRESSION_ZSTD in registration.compressions)


@lru_cache(maxsize=_LISTS)
def _listed(encodings: tuple[str, ...], zstd: bool) -> Capabilities:
    """Return what a worker knows. Cached: the thousands of a fleet list the same."""
    return Capabilities.listed(encodings, ["zstd"] if zstd else [])


def reduced_recipe(recipe: Recipe, reducible: Sequence[TensorSpec], reduction: Reduction) -> Recipe:
    """Return the recipe for tensors with few different values, or with many zeros, which only marks stand for."""
    overrides: list[tuple[str, Encoding]] = []
    for spec in reducible:
        encoding, axes = recipe.for_tensor(spec), len(spec.shape)
        if encoding == Raw():
            continue
        if reduction.clusters(spec.name, axes):
            overrides.append((glob.escape(spec.name), Codebook()))
        elif reduction.prunes(spec.name, axes) and isinstance(encoding, Uniform) and _is_sparse(reduction):
            overrides.append((glob.escape(spec.name), Threshold(_ANYTHING, encoding.bits)))
    return replace(recipe, overrides=(*overrides, *recipe.overrides))


def _is_sparse(reduction: Reduction) -> bool:
    """Return whether so much is pruned that marks of what is left take fewer bytes than zeros do after zstd."""
    return reduction.pruning is not None and reduction.pruning.ratio > _MARKS_PAY


def reduced_bits(recipe: Recipe) -> Callable[[int, Reduction], float]:
    """Return a function from a tensor's elements, and how it is reduced, to the bits of each on the wire."""
    return partial(_priced, str(recipe.without_budget()))


def _priced(text: str, elements: int, reduction: Reduction) -> float:
    return _bits_of_normal(text, min(elements, _SAMPLE), reduction)


@lru_cache(maxsize=512)
def _bits_of_normal(text: str, elements: int, reduction: Reduction) -> float:
    rng = np.random.default_rng(0)
    tensors = {"tensor": rng.standard_normal((max(1, elements), 1), np.float32)}
    spec = spec_of("tensor", tensors["tensor"])
    recipe = Recipe.parse(text).for_layout((spec,))
    reduced = ReducedTensors(tensors, reduction, tensors.keys())
    manifest = write_payload(dict(reduced), reduced_recipe(recipe, (spec,), reduction), BytesIO(), rng)
    return 8 * manifest.size_bytes / spec.size
