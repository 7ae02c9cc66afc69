"""Committing a round, against FedAvg and FedAvgM as one would write them down on whole arrays."""

import itertools
import re

import ml_dtypes
import numpy as np
import pytest

import fedgrpc.aggregator.commit as commit_module
from fedgrpc.aggregation.server_optimizer import server_optimizer
from fedgrpc.aggregator.commit import ModelCommit, groups
from fedgrpc.codec.layout import layout_of
from fedgrpc.errors import CorruptError, StorageError, UnusableUpdate, UpdateRefused
from fedgrpc.runs.merge import Merge
from fedgrpc.storage.model_file import ModelFile, write_model
from fedgrpc.storage.uploads import UploadJournal
from tests.support.stored_updates import accept

RNG = np.random.default_rng(7)
SHAPES = {"conv": (8, 3, 5, 5), "bias": (8,), "scalar": (), "empty": (0, 4), "long": (3000,)}
BASE = {name: RNG.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
BASE["half"] = RNG.normal(size=33).astype(np.float16)
BASE["brain"] = RNG.normal(size=33).astype(ml_dtypes.bfloat16)
BASE["double"] = RNG.normal(size=33)
BASE["counter"] = np.array(10, np.int64)
BASE["bytes"] = np.arange(7, dtype=np.uint8)
BASE["mask"] = np.array([True, False, True])
WEIGHTS = {"a": 3.0, "b": 100.0, "c": 0.5}


def update(seed, scale=0.1):
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, values in BASE.items():
        if values.dtype.kind in "iu":
            tensors[name] = rng.integers(0, 100, values.shape).astype(values.dtype)
        elif values.dtype == bool:
            tensors[name] = rng.integers(0, 2, values.shape).astype(bool)
        else:
            tensors[name] = (scale * rng.normal(size=values.shape)).astype(values.dtype)
    return tensors


UPDATES = {name: update(seed) for seed, name in enumerate(WEIGHTS)}


class Folder:
    """A base model and accepted updates on disk."""

    def __init__(self, path, base=BASE, updates=None, recipe="raw"):
        self.path = path
        path.mkdir(exist_ok=True)
        self.journal = UploadJournal(path / "uploads")
        write_model(self.model(1), layout_of(base), base.values())
        for token, tensors in (UPDATES if updates is None else updates).items():
            accept(self.journal, token, tensors, recipe)

    def model(self, version):
        return self.path / f"{version}.safetensors"

    def state(self, version):
        return self.path / f"state-{version}.safetensors"

    def commit(self, version=1, optimizer="fedavg", tokens=tuple(WEIGHTS), weights=WEIGHTS, learning_rate=None):
        """Write `version + 1`; returns its tensors."""
        state = ModelFile.open(self.state(version)) if self.state(version).exists() else None
        merge = Merge({token: weights[token] for token in tokens})
        optimizer = server_optimizer(optimizer, learning_rate)
        files = ModelCommit(ModelFile.open(self.model(version)), state, optimizer, merge, self.journal.load)
        digest = files.write(self.model(version + 1), self.state(version + 1))
        written = ModelFile.open(self.model(version + 1))
        assert written.sha256() == digest
        return {spec.name: written.tensor(index) for index, spec in enumerate(written.layout)}


def mean_of(name, weights=WEIGHTS):
    total = sum(weights.values())
    return sum(weights[token] / total * UPDATES[token][name].astype(np.float64) for token in weights)


def assert_close(values, expected):
    """To one rounding in the tensor's own dtype."""
    exact = np.asarray(expected).astype(values.dtype).astype(np.float64)
    tolerance = {2: 1e-2, 4: 1e-6, 8: 1e-12}[values.dtype.itemsize]
    np.testing.assert_allclose(values.astype(np.float64), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("recipe", ["raw", "raw+zstd"])
def test_fedavg_is_the_mean_weighted_by_examples(tmp_path, recipe):
    written = Folder(tmp_path, recipe=recipe).commit()
    assert list(written) == list(BASE)
    for name, values in written.items():
        assert (values.dtype, values.shape) == (BASE[name].dtype, BASE[name].shape)
        if values.dtype.kind in "iub":
            np.testing.assert_array_equal(values, np.rint(mean_of(name)).astype(values.dtype))
        else:
            assert_close(values, BASE[name].astype(np.float64) + mean_of(name))


def test_the_same_updates_give_the_same_bits_however_the_work_is_cut(tmp_path, monkeypatch):
    folder = Folder(tmp_path)
    folder.commit()
    whole = folder.model(2).read_bytes()
    for elements in (1, 10, 700):
        monkeypatch.setattr(commit_module, "_GROUP_ELEMENTS", elements)
        monkeypatch.setattr(commit_module, "_SPAN_ELEMENTS", elements)
        folder.commit()
        assert folder.model(2).read_bytes() == whole


@pytest.mark.parametrize("recipe", ["raw", "raw+zstd"])
def test_the_same_updates_give_the_same_bits_whether_their_tensors_lie_as_the_models_do_or_not(tmp_path, recipe):
    as_the_model = Folder(tmp_path / "as")
    as_the_model.commit()
    names = list(BASE)
    mixed = {"a": names, "b": names[::-1], "c": names[3:] + names[:3]}
    other = {token: {name: UPDATES[token][name] for name in order} for token, order in mixed.items()}
    folder = Folder(tmp_path / "mixed", updates=other, recipe=recipe)
    folder.commit()
    assert folder.model(2).read_bytes() == as_the_model.model(2).read_bytes()


def test_the_same_updates_give_the_same_bits_in_whatever_order_they_were_stored(tmp_path):
    files = set()
    for number, order in enumerate(itertools.permutations(UPDATES)):
        folder = Folder(tmp_path / str(number), updates={token: UPDATES[token] for token in order})
        folder.commit()
        files.add(folder.model(2).read_bytes())
    assert len(files) == 1


def test_fedavgm_remembers_its_velocity_from_version_to_version(tmp_path):
    """v = 0.9 v + delta, w = w + v (arXiv 1909.06335)."""
    folder = Folder(tmp_path)
    first = folder.commit(1, "fedavgm")
    second = folder.commit(2, "fedavgm")
    delta = mean_of("conv")
    assert_close(first["conv"], BASE["conv"] + delta)
    assert_close(second["conv"], first["conv"].astype(np.float64) + 1.9 * delta)
    np.testing.assert_array_equal(second["counter"], np.rint(mean_of("counter")))


@pytest.mark.parametrize("name", ["fedadagrad", "fedyogi", "fedadam"])
def test_the_adaptive_optimizers_remember_two_moments(tmp_path, name):
    folder = Folder(tmp_path)
    weights = BASE["conv"].astype(np.float64)
    state = (np.zeros(weights.shape), np.zeros(weights.shape))
    for version in (1, 2, 3):
        written = folder.commit(version, name)["conv"]
        weights, state = server_optimizer(name).step(weights, mean_of("conv"), state)
        np.testing.assert_allclose(written, weights, rtol=1e-5, atol=1e-6)
    kept = ModelFile.open(folder.state(4))
    assert {spec.dtype for spec in kept.layout} == {"float32"}
    np.testing.assert_allclose(kept.named("1/conv"), state[1], rtol=1e-5, atol=1e-7)
    assert not any("counter" in spec.name for spec in kept.layout)


def test_one_update_of_weight_zero_changes_nothing(tmp_path):
    weights = {"a": 1.0, "b": 0.0}
    written = Folder(tmp_path).commit(tokens=("a", "b"), weights=weights)
    assert_close(written["long"], BASE["long"].astype(np.float64) + UPDATES["a"]["long"])


def test_a_result_that_is_not_finite_is_refused_and_nothing_is_written(tmp_path):
    largest = float(np.finfo(np.float32).max)
    base = {"w": np.full(3, largest, np.float32)}
    folder = Folder(tmp_path, base, {"a": base})
    with pytest.raises(UpdateRefused, match="'w' would not be finite in float32"):
        folder.commit(tokens=("a",))
    assert not folder.model(2).exists()


@pytest.mark.parametrize("spoiled", [0, 2, 3])
def test_the_tensor_that_would_not_be_finite_is_named_among_those_that_are_read_together(tmp_path, spoiled):
    largest = float(np.finfo(np.float32).max)
    base = {f"w{number}": np.full(size, 1.0, np.float32) for number, size in enumerate((3, 1, 5, 2))}
    base[f"w{spoiled}"][-1] = largest
    with pytest.raises(UpdateRefused, match=f"'w{spoiled}' would not be finite in float32"):
        Folder(tmp_path, base, {"a": base}).commit(tokens=("a",))


def test_a_memory_that_is_not_finite_is_refused_too(tmp_path):
    """The square of 1e30 is finite in float64 and would stay in FedAdam's float32 state for ever."""
    base = {"w": np.zeros(3, np.float32)}
    folder = Folder(tmp_path, base, {"a": {"w": np.full(3, 1e30, np.float32)}})
    with pytest.raises(UpdateRefused, match="'w' would not be finite"):
        folder.commit(optimizer="fedadam", tokens=("a",))
    assert not folder.model(2).exists()
    assert not folder.state(2).exists()


def test_an_update_that_is_cut_short_on_the_disk_is_the_one_that_is_unusable(tmp_path):
    folder = Folder(tmp_path)
    path = tmp_path / "uploads" / "b.update"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UnusableUpdate) as caught:
        folder.commit()
    assert caught.value.token == "b"
    assert isinstance(caught.value.__cause__, CorruptError)
    assert not folder.model(2).exists()


def test_a_base_that_is_gone_is_a_storage_error(tmp_path):
    folder = Folder(tmp_path)
    base = ModelFile.open(folder.model(1))
    folder.model(1).unlink()
    files = ModelCommit(base, None, server_optimizer("fedavg"), Merge({"a": 1.0}), folder.journal.load)
    with pytest.raises(StorageError, match=re.escape(str(folder.model(1)))):
        files.write(folder.model(2), folder.state(2))


def test_groups_are_all_tensors_once_in_order_and_none_is_larger_than_it_must_be(monkeypatch):
    monkeypatch.setattr(commit_module, "_GROUP_ELEMENTS", 100)
    layout = layout_of({str(i): np.zeros(size) for i, size in enumerate((60, 40, 1, 250, 0, 99, 2, 98))})
    cut = [list(group) for group in groups(layout)]
    assert [index for group in cut for index in group] == list(range(8))
    assert cut == [[0, 1], [2], [3], [4, 5], [6, 7]]
    assert list(groups(())) == []
