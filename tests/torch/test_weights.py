"""Weights cross between torch and numpy under their names, bit for bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from fedgrpc.codec.layout import TensorRole
from fedgrpc.errors import LayoutError, UsageError
from fedgrpc.torch.weights import Names, load_weights, prepare, tensor_roles, weights_of
from fedgrpc.trainer import TrainResult

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
          torch.int64, torch.int32, torch.uint8, torch.bool]  # fmt: skip


class Buffers(nn.Module):
    def __init__(self, *tensors: torch.Tensor) -> None:
        super().__init__()
        for number, tensor in enumerate(tensors):
            self.register_buffer(f"b{number}", tensor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    values = torch.tensor([[0.0, 1.5, -2.0], [0.15625, 3.0, -0.0]]).abs().to(dtype)
    model, other = Buffers(values), Buffers(torch.zeros_like(values))
    weights = weights_of(model)
    assert weights["b0"].shape == (2, 3)
    load_weights(other, weights)
    assert torch.equal(other.state_dict()["b0"].view(torch.uint8), values.view(torch.uint8))


def test_bfloat16_is_ml_dtypes_bfloat16() -> None:
    assert weights_of(Buffers(torch.ones(2, dtype=torch.bfloat16)))["b0"].dtype == ml_dtypes.bfloat16


def test_names_order_and_shapes_are_the_state_dicts() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 1))
    weights = weights_of(model)
    assert list(weights) == list(model.state_dict())
    assert weights["1.num_batches_tracked"].dtype == np.int64
    assert weights["1.num_batches_tracked"].shape == ()


def test_scalars_and_empty_tensors_cross() -> None:
    model = Buffers(torch.tensor(3), torch.zeros(0, 4), torch.zeros(0, 4))
    weights = weights_of(model)
    load_weights(model, weights)
    assert [array.shape for array in weights.values()] == [(), (0, 4), (0, 4)]


def test_weights_are_copies_both_ways() -> None:
    model = nn.Linear(2, 2)
    weights = weights_of(model)
    load_weights(model, weights)
    weights["weight"][:] = 7
    assert 7 not in model.weight.tolist()[0]


def test_read_only_strided_and_big_arrays_load() -> None:
    model = nn.Linear(3, 2, bias=False)
    array = np.arange(6, dtype=np.float32).reshape(3, 2).T
    array.flags.writeable = False
    load_weights(model, {"weight": array})
    assert model.weight.tolist() == [[0, 2, 4], [1, 3, 5]]


def test_tied_tensors_cross_once_under_their_first_name_and_stay_tied() -> None:
    embed, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    head.weight = embed.weight
    model = nn.ModuleDict({"embed": embed, "head": head})
    weights = weights_of(model)
    assert list(weights) == ["embed.weight"]
    load_weights(model, {"embed.weight": np.ones((5, 3), np.float32)})
    assert head.weight.sum() == 15


def test_channels_last_parameters_keep_their_values() -> None:
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert np.array_equal(weights_of(model)["weight"], model.weight.detach().numpy())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": None}, "the run lacks weight"),
        ({"extra": np.zeros(1)}, "this worker's model lacks extra"),
        ({"weight": np.zeros((3, 2), np.float32)}, "float32\\[3, 2\\] in the run and float32\\[2, 3\\]"),
        ({"bias": np.zeros(2, np.float64)}, "float64\\[2\\] in the run and float32\\[2\\]"),
    ],
)
def test_weights_of_another_model_are_refused_and_change_nothing(
    change: dict[str, np.ndarray | None], message: str
) -> None:
    model = nn.Linear(3, 2)
    before = weights_of(model)
    changed = {"weight": np.ones((2, 3), np.float32), "bias": np.ones(2, np.float32), **change}
    with pytest.raises(LayoutError, match=message):
        load_weights(model, {name: array for name, array in changed.items() if array is not None})
    assert all(np.array_equal(before[name], array) for name, array in weights_of(model).items())


def test_a_model_that_is_not_initialized_is_refused() -> None:
    with pytest.raises(UsageError, match="'weight' is no initialized tensor"):
        weights_of(nn.LazyLinear(3))


def tied(first: str, second: str) -> nn.ModuleDict:
    embed, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    head.weight = embed.weight
    return nn.ModuleDict({first: embed, second: head})


def test_the_name_of_tied_tensors_does_not_depend_on_their_order() -> None:
    assert list(weights_of(tied("tok", "head"))) == list(weights_of(tied("head", "tok"))) == ["head.weight"]
    assert Names.of(tied("tok", "head")).tied == {"head.weight": ("tok.weight",)}


@pytest.mark.parametrize("given", [["tok.weight"], ["head.weight"], ["tok.weight", "head.weight"]])
def test_any_of_the_tied_names_serves_and_comes_back(given: list[str]) -> None:
    model = tied("tok", "head")
    names = Names.of(model)
    weights = {name: np.ones((5, 3), np.float32) for name in given}
    load_weights(model, names.to_own(weights))
    result = names.to_given(TrainResult(weights_of(model), 1, 1), weights)
    assert list(result.weights) == given
    assert model["tok"].weight.sum() == 15


def test_the_prefix_of_a_compiled_model_does_not_cross() -> None:
    model = torch.compile(nn.Sequential(nn.Linear(2, 2)), backend="eager")
    assert list(weights_of(model)) == ["0.weight", "0.bias"]
    load_weights(model, {"0.weight": np.ones((2, 2), np.float32), "0.bias": np.zeros(2, np.float32)})
    assert model.state_dict()["_orig_mod.0.weight"].sum() == 4


def test_buffers_are_statistics_or_counters_and_parameters_need_no_role() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.register_buffer("mask", torch.ones(2, dtype=torch.bool))
    assert tensor_roles(model) == {
        "1.running_mean": TensorRole.STATISTIC,
        "1.running_var": TensorRole.STATISTIC,
        "1.num_batches_tracked": TensorRole.COUNTER,
        "mask": TensorRole.COUNTER,
    }


def test_an_expanded_buffer_gets_memory_of_its_own() -> None:
    model = Buffers(torch.arange(4)[None].expand(3, 4))
    prepare(model)
    load_weights(model, weights_of(model))
    assert model.b0.tolist() == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.polar(torch.ones(4), torch.arange(4.0)), "'b0' is complex64.*persistent=False"),
        (torch.arange(4).to(torch.uint16), "'b0' is uint16.*persistent=False"),
        (torch.zeros(4).to(torch.float8_e4m3fn), "'b0' is float8_e4m3fn.*persistent=False"),
        (torch.eye(3).to_sparse(), "'b0' is no plain array.*persistent=False"),
    ],
)
def test_a_buffer_that_updates_do_not_carry_is_refused_by_name_with_the_cure(
    tensor: torch.Tensor, reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        prepare(Buffers(tensor))


def test_a_parameter_that_is_not_finite_is_refused_and_a_mask_is_not() -> None:
    prepare(Buffers(torch.full((2, 2), float("-inf"))))
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    with pytest.raises(UsageError, match="'weight'"):
        prepare(model)


def test_bools_of_other_bytes_cross_as_true() -> None:
    odd = torch.tensor([0, 255, 1, 2], dtype=torch.uint8).view(torch.bool)
    assert weights_of(Buffers(odd))["b0"].view(np.uint8).tolist() == [0, 1, 1, 1]
