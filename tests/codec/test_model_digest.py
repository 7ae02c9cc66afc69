"""The SHA-256 of a model, by which devices know that they train from the same one."""

import hashlib
import io
from dataclasses import replace

import numpy as np
import pytest

from fedgrpc.codec.layout import TensorRole, layout_of
from fedgrpc.codec.model_digest import model_digest
from fedgrpc.codec.payload import PayloadReader, buffer_reader, write_payload
from fedgrpc.codec.recipe import Recipe

TENSORS = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b.running_mean": np.zeros((), np.float64)}
LAYOUT, ARRAYS = layout_of(TENSORS), tuple(TENSORS.values())


def digest(layout=LAYOUT, arrays=ARRAYS):
    return model_digest(zip(layout, arrays, strict=True))


def test_the_bytes_that_are_hashed_are_those_of_wire_md():
    def part(data):
        return len(data).to_bytes(4) + data

    two, three = (number.to_bytes(8) for number in (2, 3))
    first = part(b"w") + part(b"float32") + part(b"parameter") + part(two + three) + part(bytes(4))
    second = part(b"b.running_mean") + part(b"float64") + part(b"statistic") + part(b"") + part(bytes(4))
    values = np.arange(6, dtype="<f4").tobytes()
    assert digest() == hashlib.sha256(first + values + second + bytes(8)).digest()
    # So that it stays what it is.
    assert digest().hex() == "1be17e2f13b55f013f0c7176718723f30a03e266b916d682f115bce3a0e288c2"


@pytest.mark.parametrize("recipe", ["raw", "raw+zstd", "int8", "int8+zstd", "float16"])
def test_how_a_model_travelled_is_not_in_it(recipe):
    payload = io.BytesIO()
    manifest = write_payload(TENSORS, Recipe.parse(recipe), payload, np.random.default_rng(0), LAYOUT)
    decoded = list(PayloadReader(manifest, buffer_reader(memoryview(payload.getvalue()))))
    again = io.BytesIO()
    values = {spec.name: array for spec, array in decoded}
    manifest = write_payload(values, Recipe.parse("raw"), again, np.random.default_rng(0), LAYOUT)
    raw = PayloadReader(manifest, buffer_reader(memoryview(again.getvalue())))
    assert model_digest(decoded) == model_digest(raw)
    assert model_digest(raw) == digest() or not Recipe.parse(recipe).lossless


@pytest.mark.parametrize(
    "change",
    [
        {"name": "v"},
        {"shape": (3, 2)},
        {"dtype": "int32"},
        {"role": TensorRole.CONSTANT},
        {"tied_names": ("v",)},
    ],
)
def test_what_gives_a_byte_its_meaning_is_in_it(change):
    changed = replace(LAYOUT[0], **change)
    array = np.frombuffer(TENSORS["w"].tobytes(), changed.numpy_dtype).reshape(changed.shape)
    assert digest((changed, LAYOUT[1]), (array, TENSORS["b.running_mean"])) != digest()


def test_one_value_and_the_order_of_tensors_are_in_it():
    other = TENSORS["w"].copy()
    other[1, 2] = np.nextafter(other[1, 2], np.float32(9))
    assert digest(arrays=(other, TENSORS["b.running_mean"])) != digest()
    assert digest(LAYOUT[::-1], ARRAYS[::-1]) != digest()
