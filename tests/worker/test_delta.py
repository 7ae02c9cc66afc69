import io

import ml_dtypes
import numpy as np
import pytest

from fedgrpc.codec.payload import PayloadReader, buffer_reader, write_payload
from fedgrpc.codec.recipe import Recipe
from fedgrpc.errors import LayoutError
from fedgrpc.worker.delta import Applied, Delta

GIVEN = {
    "weight": np.array([[1.0, 2.0], [3.0, 4.0]], np.float32),
    "half": np.array([1.5], ml_dtypes.bfloat16),
    "steps": np.array(5, np.int64),
    "bytes": np.array([250, 3], np.uint8),
    "mask": np.array([True, True, False, False]),
}
TRAINED = {
    "weight": np.array([[1.5, 2.0], [3.0, 3.0]], np.float32),
    "half": np.array([1.75], ml_dtypes.bfloat16),
    "steps": np.array(25, np.int64),
    "bytes": np.array([4, 1], np.uint8),
    "mask": np.array([True, False, True, False]),
}


def through_a_payload(delta):
    out = io.BytesIO()
    manifest = write_payload(delta, Recipe.parse("raw"), out, np.random.default_rng(0))
    return PayloadReader(manifest, buffer_reader(out.getvalue()))


def test_given_plus_delta_is_trained_in_every_dtype():
    back = Applied(through_a_payload(GIVEN), through_a_payload(Delta(TRAINED, GIVEN)))
    for name, array in TRAINED.items():
        assert back[name].dtype == array.dtype
        assert np.array_equal(back[name], array), name


def test_floats_are_differences_and_the_others_values_in_their_own_dtype():
    delta = Delta(TRAINED, GIVEN)
    assert {name: array.dtype for name, array in delta.items()} == {
        name: array.dtype for name, array in GIVEN.items()
    }
    assert delta["weight"].tolist() == [[0.5, 0], [0, -1]]
    assert delta["steps"] == 25
    assert delta["mask"].tolist() == TRAINED["mask"].tolist()


def test_neither_model_is_changed():
    given, trained = GIVEN["weight"].copy(), TRAINED["weight"].copy()
    dict(Delta(TRAINED, GIVEN))
    assert np.array_equal(GIVEN["weight"], given)
    assert np.array_equal(TRAINED["weight"], trained)


def test_float64_from_numpy_code_is_taken_for_a_float32_model():
    delta = Delta({**TRAINED, "weight": TRAINED["weight"].astype(np.float64)}, GIVEN)
    assert delta["weight"].dtype == np.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": np.zeros((2, 3), np.float32)}, r"weight.*shape \(2, 3\)"),
        ({"steps": np.array(5.0)}, r"steps.*float64"),
        ({"surplus": np.zeros(1)}, "surplus"),
    ],
)
def test_a_trained_model_of_another_layout_is_refused_by_name(change, message):
    with pytest.raises(LayoutError, match=message):
        Delta({**TRAINED, **change}, GIVEN)


def test_a_tensor_that_training_lost_is_named():
    with pytest.raises(LayoutError, match="mask"):
        Delta({name: array for name, array in TRAINED.items() if name != "mask"}, GIVEN)


def test_a_difference_that_does_not_fit_the_held_model_is_refused():
    three, four = {"weight": np.zeros(3, np.float32)}, {"weight": np.zeros(4, np.float32)}
    with pytest.raises(LayoutError, match="fit"):
        Applied(through_a_payload(three), through_a_payload(four))
    with pytest.raises(LayoutError, match="lacks"):
        Applied(through_a_payload(GIVEN), through_a_payload({"weight": GIVEN["weight"]}))
