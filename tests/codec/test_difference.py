"""A payload tells what its receivers hold after it: the base plus what they decode, to the bit."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgrpc.codec.difference import add_difference
from fedgrpc.codec.encoding import ENCODING_NAMES
from fedgrpc.codec.layout import layout_of
from fedgrpc.codec.payload import PayloadReader, PayloadWriter, buffer_reader, tensors_of
from fedgrpc.codec.recipe import Recipe
from fedgrpc.codec.values import add
from fedgrpc.errors import EncodeError

RECIPES = [*ENCODING_NAMES, "int8+zstd", "int8;b=raw", "entropy:c=1+zstd"]


def model(seed, size=700):
    rng = np.random.default_rng(seed)
    return {
        "w": rng.normal(size=(size, 3)).astype(np.float32),
        "b": rng.normal(size=size).astype(np.float32),
        "half": rng.normal(size=size).astype(np.float16),
        "n": np.array(seed),
        "bn.running_mean": np.arange(5, dtype=np.float32),
    }


def written(tensors, base, recipe, submit=None):
    """(payload as decoded, what receivers hold by name, as told)."""
    out, layout, held = io.BytesIO(), layout_of(tensors), []
    payload = PayloadWriter(out, Recipe.parse(recipe).compression)
    how = {} if submit is None else {"submit": submit}
    rng = np.random.default_rng(0)
    add_difference(payload, tensors, base, layout, Recipe.parse(recipe), rng, held.append, **how)
    manifest = payload.finish()
    told, parts = {}, iter(held)
    for spec in layout:
        sizes = [next(parts)]
        while sum(part.size for part in sizes) < spec.size:
            sizes.append(next(parts))
        told[spec.name] = np.concatenate([part.reshape(-1) for part in sizes]).reshape(spec.shape)
    assert next(parts, None) is None
    return tensors_of(PayloadReader(manifest, buffer_reader(out.getvalue()))), told


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_receivers_hold_after_a_whole_model_is_what_they_decode(recipe):
    arrived, held = written(model(1), None, recipe)
    for name in held:
        np.testing.assert_array_equal(held[name], arrived[name])


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_receivers_hold_after_a_difference_is_the_base_and_what_they_decode(recipe):
    now, base = model(2), model(1)
    arrived, held = written(now, base, recipe)
    assert "bn.running_mean" not in arrived
    for spec in layout_of(now):
        expected = add(spec, base[spec.name], arrived[spec.name]) if spec.name in arrived else base[spec.name]
        np.testing.assert_array_equal(held[spec.name], expected)


@given(seed=st.integers(0, 2**32), size=st.integers(1, 900))
def test_errors_of_differences_do_not_add_up(seed, size):
    now = model(seed, size)
    _, held = written(now, None, "int8")
    for step in range(1, 4):
        now = {name: values + step if name == "n" else values * np.float32(1.01) for name, values in now.items()}
        now = {name: values.astype(held[name].dtype) for name, values in now.items()}
        _, held = written(now, held, "int8")
        # Off by half a step or so of the last difference, of which the largest is a hundredth of the weights.
        assert np.abs(held["w"] - now["w"]).max() <= np.abs(now["w"]).max() / 100 / 127 * 2 + 1e-6


def test_calls_may_be_deferred_in_their_order():
    deferred, at_once = [], written(model(2), model(1), "int8")

    class Late(list):
        def __call__(self, call, *args):
            # As a thread does: a call waits while the next tensor is encoded.
            self.append((call, args))
            if len(self) > 2:
                call, args = self.pop(0)
                call(*args)

    late = Late()
    out, layout = io.BytesIO(), layout_of(model(2))
    payload = PayloadWriter(out, Recipe.parse("int8").compression)
    rng = np.random.default_rng(0)
    add_difference(payload, model(2), model(1), layout, Recipe.parse("int8"), rng, deferred.append, late)
    for call, args in late:
        call(*args)
    arrived = tensors_of(PayloadReader(payload.finish(), buffer_reader(out.getvalue())))
    for name, values in at_once[0].items():
        np.testing.assert_array_equal(arrived[name], values)


def test_a_value_that_is_not_finite_is_refused_by_name():
    with pytest.raises(EncodeError, match="w: "):
        written({**model(1), "w": np.full((700, 3), np.inf, np.float32)}, None, "int8")
