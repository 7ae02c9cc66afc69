"""Robust aggregation of one commit: the coordinates of all updates side by side, and what a rule makes of them.

The rule: a piece of every update at a time, so memory does not grow with their number or size. Updates of weight 0
have no say. The same updates in the same order give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

import numpy as np
import structlog

from fedgrpc.aggregation.partial_update import coverage_of, unpack
from fedgrpc.aggregation.robust.aggregation import Aggregation
from fedgrpc.aggregator.fold import Load
from fedgrpc.algorithms.companions import MARK
from fedgrpc.codec.layout import Layout, TensorSpec
from fedgrpc.codec.payload import in_pieces
from fedgrpc.errors import FedgrpcError, UnusableUpdate, UpdateRefused, blaming
from fedgrpc.runs.merge import Merge
from fedgrpc.storage.update_file import UpdateFile

# Elements of all updates together, as float64: 32 MiB.
_MOST_ELEMENTS: Final = 1 << 22
_MOST_CHARS: Final = 300

log = structlog.get_logger()


class Stacks:
    """Trained tensors of the updates of a merge that have a say, each times its scale."""

    def __init__(self, merge: Merge, load: Load) -> None:
        self._merge, self._load = merge, load
        self.tokens = tuple(token for token, weight in merge.weights.items() if weight > 0)

    def of(self, spec: TensorSpec) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield pieces of a tensor: which elements, and their values [updates, elements] in float64.

        NaN: an update does not cover the element. Raises as reading an update does.
        """
        step = max(1, _MOST_ELEMENTS // max(1, len(self.tokens)))
        for start in range(0, spec.size, step):
            piece = slice(start, min(start + step, spec.size))
            stack = np.empty((len(self.tokens), piece.stop - piece.start))
            for row, token in zip(stack, self.tokens, strict=True):
                with blaming(token):
                    self._fill(row, token, spec, piece)
            yield piece, stack

    def _fill(self, row: np.ndarray, token: str, spec: TensorSpec, piece: slice) -> None:
        file = self._load(token).open()
        with file as reader:
            if spec.name not in reader.names:
                row[:] = np.nan
                return
            entry = next(each for each in reader.manifest.entries if each.spec.name == spec.name)
            if in_pieces(entry) and token not in self._merge.sub_models:
                values = np.empty(len(row), spec.numpy_dtype)
                file.fill_from(spec.name)(values, piece.start)
                row[:] = values
            else:
                row[:] = self._spread_out(file, token, spec).reshape(-1)[piece]
        row *= self._merge.scales.get(token, 1.0)

    def _spread_out(self, file: UpdateFile, token: str, spec: TensorSpec) -> np.ndarray:
        """Return a whole tensor, with NaN where the update does not cover it."""
        reader, whole = file.reader, coverage_of(spec, self._merge.sub_models.get(token))
        values, coverage = unpack(spec.name, reader.names, reader.tensor, whole)
        if coverage.mask is not None:
            kept = np.full(coverage.sub_shape, np.nan)
            kept[coverage.mask] = values
            values = kept
        full = np.full(spec.shape, np.nan)
        full[coverage.index] = values
        return full


class Combined:
    """A tensor that a coordinate rule has combined, as a commit reads means."""

    def __init__(self, values: np.ndarray) -> None:
        untouched = np.isnan(values)
        self.covers_nothing = bool(untouched.all())
        self.untouched = untouched if untouched.any() else None
        self._values = np.where(untouched, 0.0, values)

    def result(self) -> np.ndarray:
        """Return the values, float64, and 0 where `untouched`."""
        return self._values


def combined(spec: TensorSpec, merge: Merge, load: Load) -> Combined:
    """Return what the rule of `merge` makes of one trained tensor.

    Raises `UpdateRefused` where the rule fails, and as reading an update does.
    """
    assert merge.combine is not None
    values = np.full(spec.size, np.nan)
    for piece, stack in Stacks(merge, load).of(spec):
        with _running_the_rule():
            made = np.asarray(merge.combine(stack), np.float64)
        if made.shape != stack.shape[1:]:
            raise UpdateRefused(
                f"the aggregation rule returned shape {made.shape}, not {stack.shape[1:]}: fix combine()"
            )
        # NaN leaves a coordinate as it was: a rule that returns it by mistake would stop learning without a word.
        if (empty := np.isnan(made)).any() and not np.isnan(stack[:, empty]).all():
            raise UpdateRefused(
                f"the aggregation rule returned NaN for a coordinate of {spec.name} that some of the {len(stack)} "
                "updates have: fix combine(), or set `least` and --quorum higher"
            )
        values[piece] = made
    return Combined(values.reshape(spec.shape))


@contextmanager
def _running_the_rule() -> Iterator[None]:
    """Raise `UpdateRefused` for whatever a class of the operator's own raises.

    The fault ends the round, and not the aggregator.
    """
    try:
        yield
    except (FedgrpcError, MemoryError):
        raise
    except Exception as error:
        log.exception("the aggregation rule raised")
        reason = f"the aggregation rule raised {type(error).__name__}: {' '.join(str(error).split())}"
        raise UpdateRefused(reason[:_MOST_CHARS]) from error


def judged(aggregation: Aggregation, merge: Merge, load: Load, layout: Layout) -> Merge:
    """Return `merge` as the operator's rule wants it.

    Raises `UpdateRefused` for too few updates and where the rule fails, `UnusableUpdate` for the mean of a leaf,
    and as reading does.
    """
    stacks = Stacks(merge, load)
    for token in merge.merged:
        raise UnusableUpdate("a rule judges the updates of devices, and this is the mean of several", token=token)
    if len(stacks.tokens) < aggregation.least:
        raise UpdateRefused(f"the rule needs {aggregation.least} updates, and the round has {len(stacks.tokens)}")
    if merge.sub_models and aggregation.by_coordinate:
        # Distances between updates of different coordinates mean nothing, and the rule needs none.
        return merge.voted(stacks.tokens, aggregation.rule.combine)
    products = _products(stacks, layout)
    with _running_the_rule():
        verdict = aggregation.judge(products)
    distances = dict(zip(stacks.tokens, map(float, verdict.distances), strict=True))
    if verdict.combine is not None:
        return replace(merge.voted(stacks.tokens, verdict.combine), distances=distances)
    assert verdict.shares is not None
    if np.shape(verdict.shares) != (len(products),) or not 0 < np.sum(verdict.shares) < np.inf:
        raise UpdateRefused(
            f"the aggregation rule returned no {len(products)} shares with a sum above 0: fix shares()"
        )
    shares = dict(zip(stacks.tokens, map(float, verdict.shares), strict=True))
    return replace(merge.shared_out(shares), distances=distances)


def _products(stacks: Stacks, layout: Layout) -> np.ndarray:
    """Return the products of all pairs of updates over the trained tensors of the model itself."""
    gram = np.zeros((len(stacks.tokens), len(stacks.tokens)))
    for spec in layout:
        if spec.is_trained and MARK not in spec.name:
            for _, stack in stacks.of(spec):
                gram += stack @ stack.T
    return gram
