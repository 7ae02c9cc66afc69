"""A mean that travels as one update: the mean of such means is the mean of everything that is in them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgrpc.aggregation.mean import CoordinateMean
from fedgrpc.aggregation.partial_aggregate import (
    add_partial_aggregate,
    check_partial_aggregate,
    pack_mean,
    pack_summed,
    partial_aggregate_values,
)
from fedgrpc.codec.layout import TensorSpec
from fedgrpc.errors import UpdateRefused
from fedgrpc.submodels.coverage import Coverage
from tests.aggregation.test_coverage import Update, rounds

Packed = dict[str, np.ndarray]


def total(updates: list[Update]) -> float:
    return float(sum(weight for _, weight, _ in updates))


def sent(spec: TensorSpec, updates: list[Update]) -> Packed:
    """What an aggregator sends of these updates."""
    mean = CoordinateMean(spec.shape)
    for values, weight, coverage in updates:
        mean.add(values, weight, coverage)
    return pack_mean(spec, mean, total(updates), np.dtype(spec.dtype))


def merge(spec: TensorSpec, parts: list[tuple[Packed, float]]) -> CoordinateMean:
    mean = CoordinateMean(spec.shape)
    for packed, weight in parts:
        add_partial_aggregate(mean, spec, packed.keys(), packed.__getitem__, weight, weight)
    return mean


def specs_of(packed: Packed) -> list[TensorSpec]:
    return [TensorSpec(name, array.dtype.name, array.shape) for name, array in packed.items()]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_tree_of_means_is_the_mean_of_all_updates(data: st.DataObject) -> None:
    """Depth 3: updates under leaves, leaves under middles, with slices, masks and weights of nothing."""
    shape, updates = data.draw(rounds())
    dtype = data.draw(st.sampled_from(["float32", "float64", "int64"]))
    if dtype == "int64":
        updates = [(np.rint(values).astype(np.int64), weight, coverage) for values, weight, coverage in updates]
    spec = TensorSpec("w", dtype, shape)
    flat = CoordinateMean(shape)
    for values, weight, coverage in updates:
        flat.add(values, weight, coverage)
    places = data.draw(st.lists(st.integers(0, 3), min_size=len(updates), max_size=len(updates)))
    middles = []
    for middle in range(2):
        leaves = [
            [u for u, at in zip(updates, places, strict=True) if at == 2 * middle + leaf] for leaf in range(2)
        ]
        leaves = [leaf for leaf in leaves if total(leaf) > 0]
        if leaves:
            below = [(sent(spec, leaf), total(leaf)) for leaf in leaves]
            weight = sum(weight for _, weight in below)
            middles.append((pack_mean(spec, merge(spec, below), weight, np.dtype(dtype)), weight))
    for packed, weight in middles:
        check_partial_aggregate([spec], specs_of(packed))
        assert len(list(partial_aggregate_values([spec], packed.keys(), packed.__getitem__, weight))) == bool(
            packed
        )
    root = merge(spec, middles)
    assert root.covers_nothing == flat.covers_nothing
    if flat.covers_nothing:
        return
    missing = [np.zeros(shape, bool) if mean.untouched is None else mean.untouched for mean in (root, flat)]
    assert np.array_equal(*missing)
    np.testing.assert_allclose(root.weights, np.broadcast_to(flat.weights, shape), rtol=1e-12)
    np.testing.assert_allclose(root.result(), flat.result(), atol=3e-5 if dtype == "float32" else 1e-9)


def test_a_mean_of_whole_updates_is_one_tensor_and_one_weight() -> None:
    spec = TensorSpec("w", "float32", (20, 30))
    mean = CoordinateMean(spec.shape)
    for value, weight in ((1.0, 3.0), (5.0, 1.0)):
        mean.add(np.full(spec.shape, value, np.float32), weight)
    packed = pack_mean(spec, mean, 4.0, np.dtype("float32"))
    assert packed.keys() == {"w"}
    assert (packed["w"] == 2).all()


def test_the_weights_of_slices_take_a_bit_or_two_for_each_coordinate() -> None:
    spec = TensorSpec("w", "float32", (64, 100))
    mean = CoordinateMean(spec.shape)
    mean.add(np.ones(spec.shape, np.float32), 10.0)
    half = np.arange(32)
    mean.add(np.zeros((32, 100), np.float32), 30.0, Coverage(spec.shape, (half, None)))
    packed = pack_mean(spec, mean, 40.0, np.dtype("float32"))
    assert packed["w#weights"].tolist() == [10.0, 40.0]
    assert packed["w#weights#codes"].nbytes == 6400 // 8
    assert packed["w"][0, 0] == 0.25
    assert packed["w"][63, 0] == 1


def test_a_mean_of_integers_keeps_what_rounding_takes() -> None:
    """Two pairs of counters: 1 and 2 here, 2 and 2 there. Rounded twice, their mean would be 2 or 1 by chance."""
    spec = TensorSpec("n", "int64", ())
    mean = CoordinateMean(())
    for value in (1, 2):
        mean.add(np.array(value), 1.0)
    packed = pack_mean(spec, mean, 2.0, np.dtype("int64"))
    assert packed["n"].dtype == np.int64
    other = {"n": np.array(2)}
    assert merge(spec, [(packed, 2.0), (other, 2.0)]).result() == 1.75


def test_a_mean_is_weighed_as_the_operator_says() -> None:
    spec = TensorSpec("w", "float32", (2,))
    mean = CoordinateMean((2,))
    packed = {"w": np.array([1, 1], np.float32), "w#weights": np.array([4.0, 2.0])}
    add_partial_aggregate(mean, spec, packed.keys(), packed.__getitem__, 4.0, 1.0)
    assert isinstance(mean.weights, np.ndarray)
    assert mean.weights.tolist() == [1.0, 0.5]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"w": np.zeros((3, 2), np.float32)}, "the model's is float32[2, 3]"),
        ({"x": np.zeros(3, np.float32)}, "no tensor 'x'"),
        ({"x#weights": np.zeros(3)}, "no tensor 'x#weights'"),
        ({"w#weights": np.zeros((2, 3), np.float32)}, "weights of tensor 'w'"),
        ({"w#weights": np.zeros(300), "w#weights#codes": np.zeros(6, np.uint8)}, "weights of tensor 'w'"),
        ({"w#rest": np.zeros((2, 3), np.float32)}, "rest of tensor 'w'"),
        ({"w#codes": np.zeros(1, np.uint8)}, "no tensor 'w#codes'"),
    ],
)
def test_tensors_that_are_not_of_a_mean_are_refused(changes: Packed, complaint: str) -> None:
    model = [TensorSpec("w", "float32", (2, 3)), TensorSpec("n", "int64", ())]
    honest = {"w": np.zeros((2, 3), np.float32), "n": np.array(1)}
    check_partial_aggregate(model, specs_of(honest))
    check_partial_aggregate(model, specs_of({"n": honest["n"]}))
    with pytest.raises(UpdateRefused) as refused:
        check_partial_aggregate(model, specs_of({**honest, **changes}))
    assert complaint in str(refused.value)


def test_a_tensor_listed_twice_is_refused() -> None:
    spec = TensorSpec("w", "float32", (2,))
    with pytest.raises(UpdateRefused, match="twice"):
        check_partial_aggregate([spec], [spec, replace(spec)])


@pytest.mark.parametrize("weights", [[-1.0, 1.0], [5.0, 1.0], [np.nan, 1.0], [np.inf, 1.0]])
def test_weights_beyond_the_updates_own_are_refused(weights: list[float]) -> None:
    """A coordinate never weighs more than all the updates together."""
    packed = {"w": np.zeros(2, np.float32), "w#weights": np.array(weights)}
    with pytest.raises(UpdateRefused, match="a weight of tensor 'w'"):
        list(partial_aggregate_values([TensorSpec("w", "float32", (2,))], packed.keys(), packed.__getitem__, 4.0))


@pytest.mark.parametrize("rest", [0.7, np.nan, -np.inf])
def test_a_rest_that_rounding_never_leaves_is_refused(rest: float) -> None:
    packed = {"n": np.array([1, 2]), "n#rest": np.array([0.0, rest])}
    with pytest.raises(UpdateRefused, match="the rest of tensor 'n'"):
        list(partial_aggregate_values([TensorSpec("n", "int64", (2,))], packed.keys(), packed.__getitem__, 4.0))


def test_a_mean_that_its_dtype_cannot_hold_is_refused() -> None:
    mean = CoordinateMean((1,))
    mean.add(np.array([1e6]), 1.0)
    with pytest.raises(UpdateRefused, match="not finite in float16"):
        pack_mean(TensorSpec("w", "float16", (1,)), mean, 1.0, np.dtype("float16"))


def test_the_mean_of_a_secure_sum_weighs_nothing_where_the_sum_has_no_coordinates() -> None:
    spec, dtype, nan = TensorSpec("w", "float32", (4,)), np.dtype(np.float32), np.nan
    first = pack_summed(spec, np.array([1.0, nan, 3.0, nan]), 3.0, dtype)
    second = pack_summed(spec, np.array([5.0, 6.0, nan, nan]), 1.0, dtype)
    for packed in (first, second):
        check_partial_aggregate([spec], specs_of(packed))
    merged = merge(spec, [(first, 3.0), (second, 1.0)])
    assert merged.untouched is not None
    assert merged.untouched.tolist() == [False, False, False, True]
    assert merged.result().tolist() == [2.0, 6.0, 3.0, 0.0]
    # All of it travels as one tensor, and nothing of it as none.
    assert pack_summed(spec, np.ones(4), 3.0, dtype).keys() == {"w"}
    assert pack_summed(spec, np.full(4, nan), 3.0, dtype) == {}
