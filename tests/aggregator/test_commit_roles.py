"""A version's buffers are the mean of what was measured, whatever the server optimizer does with parameters."""

import numpy as np
import pytest

from fedgrpc.aggregation.server_optimizer import OPTIMIZERS, server_optimizer
from fedgrpc.aggregator.commit import ModelCommit
from fedgrpc.codec.layout import TensorRole, TensorSpec
from fedgrpc.hierarchy.partial_aggregate import mean_tensors
from fedgrpc.runs.merge import Merge
from fedgrpc.storage.model_file import ModelFile, write_model
from fedgrpc.storage.uploads import UploadJournal
from tests.support.stored_updates import accept

MASK = np.triu(np.full((3, 3), -np.inf, np.float32), 1)
LAYOUT = (
    TensorSpec("w", "float32", (2,)),
    TensorSpec("bn.running_var", "float32", (3,), TensorRole.STATISTIC),
    TensorSpec("bn.num_batches_tracked", "int64", (), TensorRole.COUNTER),
    TensorSpec("mask", "float32", (3, 3), TensorRole.CONSTANT),
    TensorSpec("calls", "float32", (), TensorRole.COUNTER),
)
BASE = [np.zeros(2, np.float32), np.array([1, 1e4, 1e-6], np.float32), np.array(0), MASK, np.float32(3)]
WEIGHTS = {"a": 1.0, "b": 3.0, "c": 4.0}


def written(tmp_path, updates, optimizer="fedavg", versions=1, base=BASE, **about):
    """The last of so many versions, each made of the same updates."""
    journal = UploadJournal(tmp_path / "uploads")
    for token, tensors in updates.items():
        accept(journal, token, tensors)
    write_model(tmp_path / "1", LAYOUT, base)
    pairs = [(token, WEIGHTS[token]) for token in updates]
    for version in range(1, versions + 1):
        base = ModelFile.open(tmp_path / str(version))
        state = tmp_path / f"state-{version}"
        remembered = ModelFile.open(state) if state.exists() else None
        commit = ModelCommit(
            base, remembered, server_optimizer(optimizer), Merge(dict(pairs), **about), journal.load
        )
        commit.write(tmp_path / str(version + 1), tmp_path / f"state-{version + 1}")
    model = ModelFile.open(tmp_path / str(versions + 1))
    assert model.layout == LAYOUT
    return {spec.name: model.tensor(index) for index, spec in enumerate(model.layout)}


def test_statistics_are_mixed_as_parameters_are_and_counters_are_taken(tmp_path):
    """FedAsync: 1 to 4 with a share of a quarter, and a start that is not the base."""
    journal = UploadJournal(tmp_path / "uploads")
    accept(journal, "a", update([5, 0, 1e-6], 10))
    write_model(tmp_path / "0", LAYOUT, [np.full(2, 4, np.float32), *BASE[1:]])
    write_model(tmp_path / "1", LAYOUT, BASE)
    starts = [(0.25, ModelFile.open(tmp_path / "0"))]
    merge, step = Merge({"a": 2.0}, {"a": 0.25}), server_optimizer("fedavg")
    commit = ModelCommit(ModelFile.open(tmp_path / "1"), None, step, merge, journal.load, starts=starts)
    commit.write(tmp_path / "2", tmp_path / "state-2")
    new = ModelFile.open(tmp_path / "2")
    np.testing.assert_allclose(new.named("w"), [1.25, 1.25])
    np.testing.assert_allclose(new.named("bn.running_var"), [2, 0.75e4, 1e-6], rtol=1e-6)
    assert new.named("bn.num_batches_tracked") == 10


def update(variance, batches, calls=None):
    tensors = {"w": np.ones(2, np.float32), "bn.running_var": np.float32(variance)}
    tensors["bn.num_batches_tracked"] = np.array(batches)
    return tensors if calls is None else {**tensors, "calls": np.float32(calls)}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_optimizer_steps_on_statistics_and_counters(tmp_path, optimizer):
    updates = {"a": update([4, 0, 1e-8], 10, 4), "b": update([8, 0, 3e-8], 11, 6)}
    new = written(tmp_path, updates, optimizer, versions=5)
    np.testing.assert_allclose(new["bn.running_var"], [7, 0, 2.5e-8], rtol=1e-6)
    assert new["bn.num_batches_tracked"] == 11
    assert new["calls"] == 6
    assert np.array_equal(new["mask"], MASK)
    assert (new["w"] > 0).all()


def test_an_optimizer_remembers_nothing_of_buffers(tmp_path):
    written(tmp_path, {"a": update([1, 1, 1], 1)}, "fedadam")
    assert [spec.name for spec in ModelFile.open(tmp_path / "state-2").layout] == ["0/w", "1/w"]


def test_a_buffer_that_an_update_leaves_out_is_unchanged_to_its_worker_and_weighs_as_much(tmp_path):
    without = {"w": np.ones(2, np.float32)}
    new = written(tmp_path, {"a": update([5, 2e4, 1e-6], 10), "b": without})
    np.testing.assert_allclose(new["bn.running_var"], [2, 1.25e4, 1e-6], rtol=1e-6)
    assert new["bn.num_batches_tracked"] == 2


def test_a_buffer_that_a_worker_keeps_to_itself_is_the_mean_of_the_others(tmp_path):
    updates = {"a": update([5, 2e4, 1e-6], 10), "b": {"w": np.ones(2, np.float32)}}
    new = written(tmp_path, updates, keeps=lambda token, name: token == "b")
    np.testing.assert_allclose(new["bn.running_var"], [5, 2e4, 1e-6], rtol=1e-6)
    assert new["bn.num_batches_tracked"] == 10


def test_who_alone_sends_a_buffer_decides_no_more_than_its_share_of_it(tmp_path):
    base = [*BASE[:1], np.array([-np.inf, 0, np.nan], np.float32), *BASE[2:]]
    updates = {"a": update([8, 8, 8], 1), "b": {"w": np.ones(2, np.float32)}}
    new = written(tmp_path, updates, base=base)
    assert new["bn.running_var"].tolist() == [-np.inf, 2, 8]


def test_no_update_alone_takes_a_buffer_beyond_what_others_say_where_norms_are_clipped(tmp_path):
    updates = {
        "a": update([2, 1e4, 1e-6], 4),
        "b": update([3e38, 0, 3e38], 2**62),
        "c": update([4, 1.2e4, 2e-6], 6),
    }
    new = written(tmp_path, updates, clips_buffers=True)
    # Of 1 (the base), 2, 4 and 3e38 the last counts as 4; beside it weigh 2 and 4.
    np.testing.assert_allclose(new["bn.running_var"], [(2 + 3 * 4 + 4 * 4) / 8, 1e4, 1.875e-6], rtol=1e-6)
    assert new["bn.num_batches_tracked"] == 6


def test_who_alone_changes_a_buffer_changes_nothing_where_norms_are_clipped(tmp_path):
    alone = {"w": np.ones(2, np.float32)}
    new = written(tmp_path, {"a": alone, "b": update([3e38, 0, -3e38], 9), "c": alone}, clips_buffers=True)
    np.testing.assert_array_equal(new["bn.running_var"], BASE[1])
    assert new["bn.num_batches_tracked"] == 0


def test_of_two_updates_of_a_buffer_that_nobody_has_measured_both_count(tmp_path):
    base = [BASE[0], np.full(3, np.nan, np.float32), *BASE[2:]]
    new = written(tmp_path, {"a": update([4, 4, 4], 4), "b": update([8, 0, 8], 4)}, base=base, clips_buffers=True)
    assert new["bn.running_var"].tolist() == [7, 1, 7]


def test_a_buffer_that_all_updates_leave_out_stays(tmp_path):
    new = written(tmp_path, {"a": {"w": np.ones(2, np.float32)}})
    assert new["bn.running_var"].tolist() == BASE[1].tolist()
    assert new["w"].tolist() == [1, 1]


def test_a_constant_stays_whatever_an_update_says(tmp_path):
    tensors = {**update([1, 1, 1], 1), "mask": np.ones((3, 3), np.float32)}
    assert np.array_equal(written(tmp_path, {"a": tensors})["mask"], MASK)


def test_statistics_are_not_scaled_for_unequal_work(tmp_path):
    new = written(tmp_path, {"a": update([4, 4, 4], 8)}, scales={"a": 0.25})
    assert new["bn.running_var"].tolist() == [4, 4, 4]
    assert new["w"].tolist() == [0.25, 0.25]


def test_the_largest_counter_is_kept(tmp_path):
    most = np.iinfo(np.int64).max
    new = written(tmp_path, {"a": update([1, 1, 1], most), "b": update([1, 1, 1], most)})
    assert new["bn.num_batches_tracked"] > most - 2**12


def test_a_leaf_s_mean_gives_the_version_that_its_workers_would_have_given(tmp_path):
    alone = {"w": np.ones(2, np.float32)}
    updates = {"a": update([4, 0, 1e-8], 10, 4), "b": update([8, 0, 3e-8], 11, 6), "c": alone}
    weights = {"a": 1.0, "b": 3.0, "c": 4.0}
    journal = UploadJournal(tmp_path / "leaf")
    for token, tensors in updates.items():
        accept(journal, token, tensors)
    write_model(tmp_path / "1", LAYOUT, BASE)
    mean = mean_tensors(ModelFile.open(tmp_path / "1"), Merge(weights), journal.load)
    accept(journal, "leaf", {spec.name: array for spec, array in mean})
    found = []
    for merge in Merge(weights), Merge({"leaf": 8.0}, merged={"leaf": 8.0}):
        base = ModelFile.open(tmp_path / "1")
        ModelCommit(base, None, server_optimizer("fedadam"), merge, journal.load).write(
            tmp_path / "2", tmp_path / "state-2"
        )
        model = ModelFile.open(tmp_path / "2")
        found.append({spec.name: model.tensor(index) for index, spec in enumerate(model.layout)})
    for name, values in found[0].items():
        np.testing.assert_allclose(found[1][name], values, rtol=1e-6)
    assert found[0]["bn.running_var"].tolist() == pytest.approx([4, 5e3, 5.125e-7])
