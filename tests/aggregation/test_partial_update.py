"""What travels of a part of a model comes back as the values it stands for, and nothing else is taken."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgrpc.aggregation.partial_update import CODES, MASK, check_layout, pack, unpack, unpack_all
from fedgrpc.codec.layout import TensorSpec
from fedgrpc.errors import UpdateRefused
from fedgrpc.submodels.channels import ChannelGroup, ChannelMap, KeptChannels, Segment, SubModel
from fedgrpc.submodels.coverage import Coverage

MODEL = [TensorSpec("w", "float32", (8, 4)), TensorSpec("b", "float32", (8,)), TensorSpec("n", "int64", ())]
MAP = ChannelMap((ChannelGroup(8),), {"w": ((Segment(0),), (Segment(None, 4),)), "b": ((Segment(0),),)})
HALF = MAP.select(SubModel(0.5))


def specs(tensors: dict[str, np.ndarray]) -> list[TensorSpec]:
    return [TensorSpec(name, array.dtype.name, array.shape) for name, array in tensors.items()]


def update(kept: KeptChannels | None = None) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {spec.name: Coverage(spec.shape) for spec in MODEL}
    if kept is not None:
        shapes = {spec.name: kept.coverage(spec.name, spec.shape) for spec in MODEL}
    return {
        spec.name: rng.standard_normal(shapes[spec.name].sub_shape).astype(spec.dtype)
        if spec.dtype == "float32"
        else np.array(3)
        for spec in MODEL
    }


@given(
    st.integers(1, 300),
    st.sampled_from([1, 2, 3, 5, 16, 17, 200, 256]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=200, deadline=None)
def test_packing_and_unpacking_gives_back_what_was_kept(
    size: int, different: int, masked: bool, clustered: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    values = rng.choice(rng.standard_normal(different).astype(np.float32), (size, 3))
    mask = rng.random((size, 3)) < 0.4 if masked else None
    packed = pack("w", values, mask, clustered)
    check_layout([TensorSpec("w", "float32", (size, 3))], specs(packed), masked=masked, clustered=clustered)
    got, coverage = unpack("w", packed.keys(), packed.__getitem__, Coverage((size, 3)))
    assert got.dtype == np.float32
    assert np.array_equal(got, values if mask is None else values[mask])
    assert (coverage.mask is None) == (mask is None)
    assert coverage.mask is None or mask is None or np.array_equal(coverage.mask, mask)


def test_a_large_clustered_tensor_takes_its_indices_and_codebook_only() -> None:
    values = np.random.default_rng(0).choice(np.linspace(-1, 1, 16, dtype=np.float32), 200_001)
    packed = pack("w", values, clustered=True)
    assert packed["w"].shape == (16,)
    assert packed["w#codes"].nbytes == (200_001 * 4 + 7) // 8
    got, _ = unpack("w", packed.keys(), packed.__getitem__, Coverage(values.shape))
    assert np.array_equal(got, values)


def test_a_tensor_of_too_many_different_values_goes_as_it_is() -> None:
    values = np.arange(300, dtype=np.float32)
    assert pack("w", values, clustered=True).keys() == {"w"}


@pytest.mark.parametrize("kept", [None, HALF])
def test_the_plans_part_of_the_model_is_taken(kept: KeptChannels | None) -> None:
    tensors = update(kept)
    check_layout(MODEL, specs(tensors), kept)
    names, read = tensors.keys(), tensors.__getitem__
    values = {spec.name: value for spec, value in unpack_all(MODEL, names, read, kept)}
    assert all(np.array_equal(values[name], array) for name, array in tensors.items())


def test_personal_tensors_are_not_sent() -> None:
    tensors = update()
    with pytest.raises(UpdateRefused, match="no tensor 'b'"):
        check_layout(MODEL, specs(tensors), kept_back=lambda name: name == "b")
    del tensors["b"]
    check_layout(MODEL, specs(tensors), kept_back=lambda name: name == "b")
    with pytest.raises(UpdateRefused, match="'b' is missing"):
        check_layout(MODEL, specs(tensors))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            {"w": np.zeros((8, 4), np.float32)},
            r"float32\[8, 4\], .* has float32\[4, 4\]",
        ),
        ({"w": np.zeros((4, 4), np.float64)}, "is float64"),
        ({"x": np.zeros(3, np.float32)}, "no tensor 'x'"),
        ({"w#mask": np.zeros(2, np.uint8)}, "no tensor 'w#mask'"),
        ({"w": np.zeros(5, np.float32), "w#mask": np.zeros(2, np.uint8)}, r"float32\[5\]"),
    ],
)
def test_what_the_plan_does_not_say_is_refused(change: dict[str, np.ndarray], complaint: str) -> None:
    with pytest.raises(UpdateRefused, match=complaint):
        check_layout(MODEL, specs({**update(HALF), **change}), HALF)


@pytest.mark.parametrize(
    "change",
    [
        {"w": np.zeros(17, np.float32), "w#mask": np.zeros(2, np.uint8)},
        {"w": np.zeros(3, np.float32), "w#mask": np.zeros(3, np.uint8)},
        {"w": np.zeros(3, np.float32), "w#mask": np.zeros(2, np.int8)},
        {"w": np.zeros((1, 3), np.float32), "w#mask": np.zeros(2, np.uint8)},
        {"w": np.zeros(3, np.float32), "w#codes": np.zeros(5, np.uint8)},
        {"w": np.zeros(0, np.float32), "w#codes": np.zeros(2, np.uint8)},
        {"w": np.zeros(257, np.float32), "w#codes": np.zeros(18, np.uint8)},
        {"w": np.zeros(3, np.float32), "w#codes": np.zeros((2, 2), np.uint8)},
    ],
    ids=str,
)
def test_shapes_that_cannot_be_a_packed_tensors_are_refused_before_any_byte(change: dict[str, np.ndarray]) -> None:
    with pytest.raises(UpdateRefused, match="tensor 'w'"):
        check_layout(MODEL, specs({**update(HALF), **change}), HALF, masked=True, clustered=True)


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ({"w": np.zeros(3), "w" + MASK: np.array([0b11111, 0], np.uint8)}, "3 values, its mask keeps 5"),
        ({"w": np.zeros(3), "w" + CODES: np.full(4, 0xFF, np.uint8)}, "beyond its 3 values"),
        ({"w": np.zeros(3), "w" + CODES: np.zeros(3, np.uint8)}, "3 bytes of codes for 16"),
        (
            {"w": np.zeros(2), "w" + MASK: np.array([1, 0], np.uint8), "w" + CODES: np.zeros(2, np.uint8)},
            "2 bytes of codes for 1",
        ),
    ],
)
def test_masks_and_codes_that_do_not_fit_their_values_are_refused(
    tensors: dict[str, np.ndarray], complaint: str
) -> None:
    with pytest.raises(UpdateRefused, match=complaint):
        unpack("w", tensors.keys(), tensors.__getitem__, Coverage((4, 4)))
