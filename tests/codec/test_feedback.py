from __future__ import annotations

import io

import numpy as np
import pytest

from fedgrpc.codec.feedback import Residual, write_with_feedback
from fedgrpc.codec.layout import Array
from fedgrpc.codec.payload import PayloadReader, buffer_reader, tensors_of
from fedgrpc.codec.recipe import Recipe

Tensors = dict[str, Array]


def send(delta: Tensors, residual: Residual, recipe: str, seed: int = 0) -> tuple[Tensors, Residual]:
    out = io.BytesIO()
    rng = np.random.default_rng(seed)
    manifest, left = write_with_feedback(delta, residual, Recipe.parse(recipe), out, rng)
    return tensors_of(PayloadReader(manifest, buffer_reader(out.getvalue()))), left


def delta(seed: int) -> Tensors:
    rng = np.random.default_rng(seed)
    return {"w": rng.standard_normal((50, 400)).astype(np.float32), "count": np.array([seed], np.int64)}


@pytest.mark.parametrize("recipe", ["int8+zstd", "int4", "int3", "int2:rounding=nearest", "float16", "bfloat16"])
def test_what_was_sent_over_many_rounds_plus_the_residual_is_what_was_trained(recipe: str) -> None:
    residual, trained, sent = Residual(), np.zeros((50, 400)), np.zeros((50, 400))
    for round_number in range(20):
        update = delta(round_number)
        received, residual = send(update, residual, recipe, round_number)
        trained += update["w"]
        sent += received["w"]
    np.testing.assert_allclose(sent + residual.tensors["w"], trained, atol=1e-4)
    assert np.abs(residual.tensors["w"]).max() < 40
    assert set(residual.tensors) == {"w"}


def test_the_residual_is_dropped_when_the_layout_changes() -> None:
    _, residual = send(delta(0), Residual(), "int4")
    changed = {"w": delta(1)["w"][:, :399], "count": delta(1)["count"]}
    with_old, _ = send(changed, residual, "int4", seed=9)
    without, _ = send(changed, Residual(), "int4", seed=9)
    np.testing.assert_array_equal(with_old["w"], without["w"])


def test_neither_the_delta_nor_the_old_residual_changes() -> None:
    update = delta(0)
    _, residual = send(update, Residual(), "int4")
    before = (update["w"].copy(), residual.tensors["w"].copy())
    send(update, residual, "int4")
    np.testing.assert_array_equal(update["w"], before[0])
    np.testing.assert_array_equal(residual.tensors["w"], before[1])


def test_an_encoding_that_is_not_contractive_keeps_no_residual() -> None:
    _, residual = send(delta(0), Residual(), "int2")
    assert residual.tensors == {}


def test_lossless_payloads_owe_nothing_and_pay_what_is_owed() -> None:
    first, second = delta(0), delta(1)
    received, residual = send(first, Residual(), "int4")
    paid, left = send(second, residual, "raw")
    np.testing.assert_allclose(received["w"] + paid["w"], first["w"] + second["w"], atol=1e-5)
    assert left.tensors == {}
