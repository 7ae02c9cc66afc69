"""What a leaf makes of its updates: the same bits, averaged as they lie in the files or decoded."""

import ml_dtypes
import numpy as np

from fedgrpc.codec.layout import layout_of
from fedgrpc.hierarchy.partial_aggregate import mean_tensors
from fedgrpc.runs.merge import Merge
from fedgrpc.storage.model_file import ModelFile, write_model
from fedgrpc.storage.uploads import UploadJournal
from tests.support.stored_updates import accept

RNG = np.random.default_rng(11)
WEIGHTS = {"a": 3.0, "b": 100.0, "c": 0.5}


def update():
    return {
        "long": RNG.normal(size=(300, 401)).astype(np.float32),
        "half": RNG.normal(size=33).astype(np.float16),
        "brain": RNG.normal(size=33).astype(ml_dtypes.bfloat16),
        "scalar": RNG.normal(size=()),
        "empty": np.zeros((0, 4), np.float32),
    }


def mean(journal, base, decoded):
    """`decoded`: as updates that might be of a part of the model, whose part is all of it."""
    parts = dict.fromkeys(WEIGHTS) if decoded else {}
    return dict(mean_tensors(base, Merge(WEIGHTS, {"b": 0.25}, parts), journal.load))


def test_a_mean_of_floats_that_lie_in_files_is_the_mean_of_decoded_ones_bit_for_bit(tmp_path):
    journal, updates = UploadJournal(tmp_path), {token: update() for token in WEIGHTS}
    for token, tensors in updates.items():
        accept(journal, token, tensors)
    write_model(tmp_path / "base", layout_of(updates["a"]), updates["a"].values())
    base = ModelFile.open(tmp_path / "base")
    in_place, decoded = mean(journal, base, False), mean(journal, base, True)
    assert list(in_place) == list(decoded)
    for name, array in decoded.items():
        assert (in_place[name].dtype, in_place[name].shape) == (array.dtype, array.shape)
        assert in_place[name].tobytes() == array.tobytes()
