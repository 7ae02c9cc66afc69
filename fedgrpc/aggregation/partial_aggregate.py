"""Partial aggregates: the mean of many updates, which a leaf sends to its parent as one update.

A tensor of the model is one of these in it:

    NAME                         the mean in the model's dtype; left out where no update covers it
    NAME, NAME#weights           and the weight of each coordinate, float64, where that is not the update's weight
    NAME, NAME#rest              and what rounding to integers took from the mean, float64

A tensor has few different weights, one for each set of sub-models that its devices train. They are packed like the
values of a clustered tensor (see `partial_update`): NAME#weights, NAME#weights#codes.

The mean of such means is the mean of all the updates, up to one rounding to the model's dtype.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from fedgrpc.aggregation.admission import TensorLike, check_role
from fedgrpc.aggregation.mean import CoordinateMean
from fedgrpc.aggregation.partial_update import CODES, Read, fits, pack, unpack
from fedgrpc.errors import NotFinite, UpdateRefused
from fedgrpc.submodels.coverage import Coverage

WEIGHTS, REST = "#weights", "#rest"
# Tensors that must be encoded without loss: an inexact weight would shift the mean of all coordinates it covers.
EXACT = (f"*{WEIGHTS}", f"*{REST}")
# Weights are float64 sums: the total and that of a coordinate may round differently.
_SLACK = 1 + 1e-9


def pack_mean(tensor: TensorLike, mean: CoordinateMean, weight: float, dtype: np.dtype) -> dict[str, np.ndarray]:
    """Return the tensors that travel for a tensor's mean; `weight` is that of the whole update. Uses `mean` up.

    Raises `NotFinite` when the mean is not finite in `dtype`.
    """
    if mean.covers_nothing:
        return {}
    weights, values = mean.weights, mean.result()
    packed: dict[str, np.ndarray] = {}
    if dtype.kind in "iub":
        # Counters travel as integers. What rounding takes travels beside them, so that means of means stay exact.
        rounded = np.rint(values)
        if (rest := values - rounded).any():
            packed[tensor.name + REST] = rest
        values = rounded
    return packed | _with_weights(tensor, values, weights, weight, dtype)


def pack_summed(tensor: TensorLike, mean: np.ndarray, weight: float, dtype: np.dtype) -> dict[str, np.ndarray]:
    """Return what travels for a tensor of which a secure sum gave the mean, NaN where it says nothing.

    Raises `NotFinite` when the mean is not finite in `dtype`.
    """
    unknown = np.isnan(mean)
    if mean.size and unknown.all():
        return {}
    return _with_weights(tensor, np.where(unknown, 0.0, mean), np.where(unknown, 0.0, weight), weight, dtype)


def _with_weights(
    tensor: TensorLike, mean: np.ndarray, weights: np.ndarray | float, weight: float, dtype: np.dtype
) -> dict[str, np.ndarray]:
    """Return the mean in `dtype`, and the weights of its coordinates where they are not all that of the update."""
    with np.errstate(over="ignore"):
        packed = {tensor.name: mean.astype(dtype)}
    check_finite(tensor, packed[tensor.name])
    if np.any(weights != weight):
        packed |= pack(tensor.name + WEIGHTS, np.broadcast_to(weights, tensor.shape), clustered=True)
    return packed


def check_finite(tensor: TensorLike, mean: np.ndarray) -> None:
    """Raise `NotFinite` unless the dtype can hold the mean."""
    if mean.dtype.kind not in "iub" and not np.isfinite(mean).all():
        raise NotFinite(f"the mean of tensor {tensor.name!r} is not finite in {tensor.dtype}", tensor=tensor.name)


def check_partial_aggregate(model: Sequence[TensorLike], update: Sequence[TensorLike]) -> None:
    """Raise `UpdateRefused` unless the update lists tensors of the model once, with weights and rests that fit.

    The error names the first difference.
    """
    given = {tensor.name: tensor for tensor in update}
    if len(given) < len(update):
        raise UpdateRefused("the update lists a tensor twice")
    own = {tensor.name: given.pop(tensor.name) for tensor in model if tensor.name in given}
    for tensor in model:
        if tensor.name not in own:
            continue
        mine = own[tensor.name]
        if (mine.dtype, mine.shape) != (tensor.dtype, tensor.shape):
            raise UpdateRefused(
                f"tensor {tensor.name!r} is {mine.dtype}{list(mine.shape)}, the model's is "
                f"{tensor.dtype}{list(tensor.shape)}"
            )
        check_role(tensor, mine)
        weights, codes = given.pop(tensor.name + WEIGHTS, None), given.pop(tensor.name + WEIGHTS + CODES, None)
        rest = given.pop(tensor.name + REST, None)
        if weights is not None and not (
            weights.dtype == "float64" and fits(weights.shape, tensor.shape, None, codes)
        ):
            raise UpdateRefused(f"the weights of tensor {tensor.name!r} do not fit it")
        if rest is not None and (rest.dtype, rest.shape) != ("float64", tensor.shape):
            raise UpdateRefused(f"the rest of tensor {tensor.name!r} does not fit it")
    if given:
        raise UpdateRefused(f"the model has no tensor {min(given)!r}")


def add_partial_aggregate(
    mean: CoordinateMean,
    tensor: TensorLike,
    names: Collection[str],
    read: Read,
    own: float,
    weight: float,
    scale: float = 1.0,
) -> None:
    """Add `scale` times a tensor of a partial aggregate to `mean` with `weight`.

    `own` is the weight that the partial aggregate claims. Raises `UpdateRefused` for impossible weights.
    """
    if tensor.name not in names:
        return
    values = _values(tensor, names, read)
    weights = _weights(tensor, names, read, own)
    if weights is None:
        mean.add(values, weight, scale=scale)
    else:
        mean.add_mean(values if scale == 1.0 else values.astype(np.float64) * scale, weights * (weight / own))


def partial_aggregate_values(
    model: Sequence[TensorLike], names: Collection[str], read: Read, weight: float
) -> Iterator[tuple[TensorLike, np.ndarray]]:
    """Yield each tensor of the update with its values, its weights checked. Raises `UpdateRefused`."""
    for tensor in model:
        if tensor.name in names:
            _weights(tensor, names, read, weight)
            yield tensor, _values(tensor, names, read)


def _values(tensor: TensorLike, names: Collection[str], read: Read) -> np.ndarray:
    values = read(tensor.name)
    if tensor.name + REST not in names:
        return values
    rest = read(tensor.name + REST)
    if not (np.abs(rest) <= 0.5).all():
        raise UpdateRefused(f"the rest of tensor {tensor.name!r} is more than rounding takes")
    return values + rest


def _weights(tensor: TensorLike, names: Collection[str], read: Read, weight: float) -> np.ndarray | None:
    """Return the weight of each coordinate; None: all weigh as much as the update."""
    if tensor.name + WEIGHTS not in names:
        return None
    weights, _ = unpack(tensor.name + WEIGHTS, names, read, Coverage(tensor.shape))
    if not ((weights >= 0) & (weights <= weight * _SLACK)).all():
        raise UpdateRefused(f"a weight of tensor {tensor.name!r} is not from 0 to the update's own, {weight:g}")
    return weights
