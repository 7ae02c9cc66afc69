"""Means straight from the files of updates, against those of whole arrays."""

import itertools

import numpy as np
import pytest

import fedgrpc.aggregator.fold as fold_module
from fedgrpc.aggregation.mean import TensorMean
from fedgrpc.aggregation.server_optimizer import server_optimizer
from fedgrpc.aggregator.commit import ModelCommit
from fedgrpc.aggregator.fold import PIECE, Fold
from fedgrpc.codec.layout import TensorSpec, layout_of
from fedgrpc.runs.merge import Merge
from fedgrpc.storage.model_file import ModelFile, write_model
from fedgrpc.storage.uploads import UploadJournal
from tests.support.stored_updates import accept

LARGE = TensorSpec("large", "float32", (5, PIECE // 2 + 77))
# Too small to be encoded: it travels as it is.
SMALL = TensorSpec("small", "float16", (3, 5))
UPDATES = [(f"update-{number}", 1.0 + number) for number in range(4)]
SCALES = {"update-1": 0.3, "update-2": 2.0}


@pytest.fixture(params=["raw", "int8+zstd", "int4", "int3+zstd"])
def journal(request, tmp_path):
    journal = UploadJournal(tmp_path / "uploads")
    for number, (token, _) in enumerate(UPDATES):
        rng = np.random.default_rng(number)
        tensors = {spec.name: rng.normal(size=spec.shape).astype(spec.dtype) for spec in (LARGE, SMALL)}
        accept(journal, token, tensors, request.param)
    return journal


def naive(journal, spec, scales):
    mean = TensorMean(spec.shape)
    for token, weight in UPDATES:
        with journal.load(token).open() as reader:
            mean.add(reader.tensor(spec.name), weight, scale=scales.get(token, 1.0))
    return mean.result().reshape(-1)


@pytest.mark.parametrize("most_open", [8, 3])
@pytest.mark.parametrize("scales", [{}, SCALES])
def test_the_mean_in_pieces_is_that_of_whole_tensors_bit_for_bit(journal, monkeypatch, most_open, scales):
    monkeypatch.setattr(fold_module, "_MOST_OPEN", most_open)
    monkeypatch.setattr(fold_module, "_MOST_OPEN_PLAIN", most_open)
    with Fold(UPDATES, journal.load, scales) as fold:
        for spec, step in itertools.product((LARGE, SMALL), (PIECE, 2 * PIECE, LARGE.size)):
            assert fold.covers(spec)
            starts = range(0, spec.size, step)
            pieces = [fold.mean(spec, at, min(at + step, spec.size)).copy() for at in starts]
            np.testing.assert_array_equal(np.concatenate(pieces), naive(journal, spec, scales))


@pytest.mark.parametrize(("recipe", "large_steps"), [("raw", False), ("int8", True), ("int8+zstd", True)])
def test_many_files_that_hold_nothing_stay_open_and_small_steps_do(tmp_path, recipe, large_steps):
    journal, updates = UploadJournal(tmp_path / "uploads"), [(f"update-{number}", 1.0) for number in range(20)]
    tensors = {"w": np.ones((64, 2000), np.float32)}
    for token, _ in updates:
        accept(journal, token, tensors, recipe)
    (spec,) = layout_of(tensors)
    with Fold(updates, journal.load, {}) as fold:
        assert fold.covers(spec)
        assert (fold.step > PIECE) == large_steps
        np.testing.assert_allclose(fold.mean(spec, 0, 100), 1.0, rtol=0.01)


def test_integers_and_what_cannot_be_cut_are_left_to_others(tmp_path):
    journal = UploadJournal(tmp_path / "uploads")
    tensors = {"w": np.ones((40, 40), np.float32), "n": np.arange(3)}
    accept(journal, "a", tensors, "int8")
    accept(journal, "b", tensors, "rotated2")
    w, n = layout_of(tensors)
    with Fold([("a", 1.0)], journal.load, {}) as fold:
        assert fold.covers(w)
        assert not fold.covers(n)
    for updates in ([("a", 1.0), ("b", 1.0)], [("a", 0.0)], []):
        with Fold(updates, journal.load, {}) as fold:
            assert not fold.covers(w)


@pytest.mark.parametrize("recipe", ["raw", "int8+zstd", "rotated4"])
@pytest.mark.parametrize("optimizer", ["fedavg", "fedavgm"])
def test_a_commit_scales_the_difference_of_each_update(tmp_path, recipe, optimizer):
    base = {"w": np.zeros((40, 40), np.float32)}
    journal = UploadJournal(tmp_path / "uploads")
    for token, value in (("a", 1.0), ("b", 3.0)):
        accept(journal, token, {"w": np.full((40, 40), value, np.float32)}, recipe)
    write_model(tmp_path / "1.safetensors", layout_of(base), base.values())
    files = ModelCommit(
        ModelFile.open(tmp_path / "1.safetensors"),
        None,
        server_optimizer(optimizer),
        Merge({"a": 1.0, "b": 1.0}, {"a": 0.5}),
        journal.load,
    )
    files.write(tmp_path / "2.safetensors", tmp_path / "state.safetensors")
    written = ModelFile.open(tmp_path / "2.safetensors").named("w")
    assert written.mean() == pytest.approx((0.5 * 1.0 + 3.0) / 2, rel=0.1)
