"""What workers hold, kept to make differences to: no file is another's while a difference to it is being made."""

import io

import numpy as np

from fedgrpc.aggregator.delta_bases import DeltaBases, PayloadSource
from fedgrpc.codec.layout import layout_of
from fedgrpc.codec.recipe import Recipe
from fedgrpc.storage.model_file import ModelTensors

# Many, so that a difference takes a while; small ones travel as they are, and are read one by one.
MODEL = {f"layer{number}": np.full(40, float(number), np.float32) for number in range(2000)}
LAYOUT = layout_of(MODEL)


def written(bases, version, value, base=None):
    """The key of the delta base of a model of which each element is `value`."""
    model = {name: np.full(40, value, np.float32) for name in MODEL}
    source = PayloadSource(version, LAYOUT, model, base)
    manifest = bases.write(source, Recipe.parse("raw"), io.BytesIO(), np.random.default_rng(0))
    return version, manifest.digest, ""


def test_a_form_that_is_read_stays_what_it_is_while_others_are_pruned_and_written(tmp_path):
    bases = DeltaBases(tmp_path)
    read, gone = written(bases, 1, 1.0), written(bases, 2, 2.0)
    with bases.reading(read) as base:
        tensors = ModelTensors(base)
        bases.prune(frozenset({3}))
        assert not bases.knows(gone)
        written(bases, 3, 3.0)
        written(bases, 4, 4.0)
        assert {float(tensors[name].max()) for name in MODEL} == {1.0}
    bases.prune(frozenset({3}))
    assert not bases.knows(read)
