"""Statistics, counters and constants travel as values, without loss, or not at all."""

import io

import numpy as np
import pytest

from fedgrpc.codec.feedback import Residual, write_with_feedback
from fedgrpc.codec.layout import TensorRole, TensorSpec, check_unique, layout_of, role_by_name
from fedgrpc.codec.payload import PayloadReader, buffer_reader, write_payload
from fedgrpc.codec.recipe import Recipe
from fedgrpc.codec.values import add, left_out, subtract
from fedgrpc.errors import EncodeError, LayoutError
from fedgrpc.protocol.tensors import layout_from_proto, layout_to_proto
from fedgrpc.v1 import tensor_pb2

RNG = np.random.default_rng(3)
VARIANCE = np.logspace(-8, 4, 100).astype(np.float32)
MASK = np.triu(np.full((16, 16), -np.inf, np.float32), 1)
STATE = {"weight": RNG.normal(size=100).astype(np.float32), "bn.running_var": VARIANCE, "mask": MASK}
KNOWN = (TensorSpec("mask", "float32", (16, 16), TensorRole.CONSTANT),)


def test_names_tell_the_batch_statistics_of_pytorch() -> None:
    assert role_by_name("1.bn.running_mean") is role_by_name("running_var") is TensorRole.STATISTIC
    assert role_by_name("bn.num_batches_tracked") is TensorRole.COUNTER
    assert role_by_name("bn.weight") is role_by_name("running_mean.weight") is TensorRole.PARAMETER


@pytest.mark.parametrize("recipe", ["int8", "entropy:c=5+zstd", "topk:fraction=0.1", "rotated1", "int8;*=int2"])
def test_buffers_travel_without_loss_whatever_the_recipe(recipe: str) -> None:
    out = io.BytesIO()
    manifest = write_payload(STATE, Recipe.parse(recipe), out, RNG, KNOWN)
    reader = PayloadReader(manifest, buffer_reader(out.getvalue()))
    assert np.array_equal(reader.tensor("bn.running_var"), VARIANCE)
    assert np.array_equal(reader.tensor("mask"), MASK)
    assert not np.array_equal(reader.tensor("weight"), STATE["weight"])


def test_a_parameter_that_is_not_finite_is_still_refused() -> None:
    with pytest.raises(EncodeError, match="mask"):
        write_payload({"mask": MASK}, Recipe.parse("raw"), io.BytesIO(), RNG)


def test_bools_of_other_bytes_are_written_as_readers_take_them() -> None:
    odd = np.array([0, 255, 1, 2], np.uint8).view(np.bool_)
    out = io.BytesIO()
    manifest = write_payload({"m": odd}, Recipe.parse("raw"), out, RNG)
    assert out.getvalue() == b"\0\1\1\1"
    assert PayloadReader(manifest, buffer_reader(out.getvalue())).tensor("m").tolist() == [False, True, True, True]


def test_a_statistic_is_its_own_difference_and_comes_back_to_the_bit() -> None:
    spec = TensorSpec("v", "float32", (2,), TensorRole.STATISTIC)
    old, new = np.array([1e6, 1e6], np.float32), np.array([1e-8, 0.1], np.float32)
    assert np.array_equal(add(spec, old, subtract(spec, new, old)), new)


def test_only_buffers_that_did_not_change_are_left_out() -> None:
    variance, weight, mask = layout_of(STATE, KNOWN)[1], layout_of(STATE)[0], KNOWN[0]
    assert left_out(variance, VARIANCE, VARIANCE.copy())
    assert left_out(mask, MASK, MASK.copy())
    assert not left_out(variance, VARIANCE, VARIANCE * 2)
    assert not left_out(weight, STATE["weight"], STATE["weight"].copy())


def test_buffers_owe_nothing_and_their_coming_and_going_keeps_the_residual() -> None:
    recipe = Recipe.parse("int4")
    _, owed = write_with_feedback(STATE, Residual(), recipe, io.BytesIO(), RNG, layout_of(STATE, KNOWN))
    assert owed.tensors.keys() == {"weight"}
    fewer = layout_of({"weight": STATE["weight"]})
    assert owed.for_layout(fewer) is owed


def test_roles_and_tied_names_cross_the_wire() -> None:
    layout = (
        TensorSpec("a", "float32", (2,), TensorRole.CONSTANT, ("b", "c")),
        TensorSpec("bn.running_var", "float32", (2,), TensorRole.PARAMETER),
        TensorSpec("bn.running_mean", "float32", (2,), TensorRole.STATISTIC),
        TensorSpec("w", "float32", (2,)),
    )
    assert layout_from_proto(layout_to_proto(layout)) == layout


def test_without_a_role_on_the_wire_the_name_tells_it() -> None:
    told = [tensor_pb2.TensorSpec(name=name, dtype=tensor_pb2.DTYPE_FLOAT32) for name in ("w", "x.running_var")]
    assert [spec.role for spec in layout_from_proto(told)] == [TensorRole.PARAMETER, TensorRole.STATISTIC]


@pytest.mark.parametrize(
    "told",
    [
        [{"name": "w", "role": 9}],
        [{"name": "w", "tied_names": ["w"]}],
        [{"name": "w", "tied_names": ["x"]}, {"name": "x"}],
        [{"name": "w", "tied_names": [""]}],
        [{"name": "w", "tied_names": ["n" * 1025]}],
        [{"name": "w", "tied_names": [str(n) for n in range(65)]}],
    ],
    ids=["role", "itself", "another", "empty", "long", "many"],
)
def test_roles_and_tied_names_that_cannot_be_are_refused(told: list[dict[str, object]]) -> None:
    with pytest.raises(LayoutError):
        layout_from_proto([tensor_pb2.TensorSpec(dtype=tensor_pb2.DTYPE_FLOAT32, **each) for each in told])  # type: ignore[arg-type]


def test_a_name_is_unique_among_tied_ones_too() -> None:
    with pytest.raises(LayoutError, match="twice"):
        check_unique((TensorSpec("a", "float32", (), tied_names=("b",)), TensorSpec("b", "float32", ())))
