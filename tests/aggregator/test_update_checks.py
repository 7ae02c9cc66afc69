"""Checks of an update by what its task asks for, without a coordinator or gRPC."""

from dataclasses import replace

import numpy as np
import pytest

from fedgrpc.aggregation.admission import AdmissionPolicy
from fedgrpc.aggregator.update_checks import ExpectedUpdate, examine, norm_of, verify
from fedgrpc.codec.layout import layout_of
from fedgrpc.codec.manifest import Limits
from fedgrpc.errors import LayoutError, TooLargeError, UpdateRefused
from fedgrpc.rounds.policy import TaskKind
from fedgrpc.runs.task_context import LocalTask
from fedgrpc.runs.weighing import Weighing
from fedgrpc.storage.uploads import UploadJournal
from fedgrpc.training_plan import TrainingPlan
from tests.support.stored_updates import accept, encoded, header_of

MODEL = {"w": np.zeros((3, 4), np.float32), "bn.running_var": np.ones(4, np.float32)}
EXPECTED = ExpectedUpdate(
    TaskKind.TRAIN,
    layout_of(MODEL),
    LocalTask(),
    None,
    leads=False,
    limits=Limits(),
    admission=AdmissionPolicy(),
    max_model_bytes=1000,
    weighing=Weighing({}),
)
INITIAL = replace(EXPECTED, kind=TaskKind.INITIALIZE, layout=())


def examined(tensors, expected=EXPECTED, recipe="raw", **header):
    return examine(header_of(encoded(tensors, recipe)[0], **header), expected)


def verified(folder, tensors, expected=EXPECTED, recipe="raw"):
    verify(accept(UploadJournal(folder), "a", tensors, recipe), expected)


def with_w(value):
    return {**MODEL, "w": np.full((3, 4), value, np.float32)}


def test_the_header_of_an_honest_update_gives_its_manifest_and_report():
    manifest, report = examined(MODEL, steps=3)
    assert (manifest.layout, report.example_count, report.steps) == (layout_of(MODEL), 5, 3)


def test_an_update_of_another_shape_is_refused_before_its_first_byte():
    with pytest.raises(UpdateRefused, match="w"):
        examined({**MODEL, "w": np.zeros((4, 3), np.float32)})


def test_a_mean_is_taken_from_an_aggregator_alone():
    with pytest.raises(UpdateRefused, match="an aggregator alone"):
        examined(MODEL, merged_updates=2, weight=3.0)


def test_a_payload_beyond_the_limit_is_refused_by_its_header():
    with pytest.raises(TooLargeError):
        examined(MODEL, replace(EXPECTED, limits=Limits(max_payload_bytes=10)))


def test_steps_count_only_where_others_updates_depend_on_them():
    plan = TrainingPlan(epochs=2.0)
    bounded = replace(EXPECTED, weighing=Weighing({}, plan=replace(plan, algorithm="fednova")))
    examined(MODEL, bounded, steps=10)
    examined(MODEL, steps=1000)
    examined({}, replace(bounded, kind=TaskKind.EVALUATE), steps=1000)
    with pytest.raises(UpdateRefused, match="1000 steps"):
        examined(MODEL, bounded, steps=1000)


def test_an_update_of_scores_alone_counts_the_examples_that_were_scored():
    expected = replace(EXPECTED, kind=TaskKind.EVALUATE)
    header = header_of(encoded({})[0], evaluation_example_count=7)
    header.example_count = 0
    assert examine(header, expected)[1].example_count == header.example_count == 7
    with pytest.raises(UpdateRefused):
        examined(MODEL, expected)


@pytest.mark.parametrize(
    ("tensors", "recipe", "why"),
    [
        ({}, "raw", "no tensors"),
        ({"w": np.ones(200, np.float32)}, "int8", "lossless"),
        ({"w": np.zeros(400, np.float32)}, "raw", "--max-model"),
        ({"../w": np.zeros(4, np.float32)}, "raw", "path"),
    ],
)
def test_initial_weights_are_those_of_a_model_that_everyone_can_read(tensors, recipe, why):
    examined({"w": np.zeros(4, np.float32)}, INITIAL)
    with pytest.raises((UpdateRefused, LayoutError), match=why):
        examined(tensors, INITIAL, recipe)


@pytest.mark.parametrize("recipe", ["raw", "int8+zstd"])
def test_values_within_the_bounds_are_accepted(tmp_path, recipe):
    verified(tmp_path, with_w(1.0), recipe=recipe)


@pytest.mark.parametrize("recipe", ["raw", "int8+zstd"])
def test_values_far_too_large_are_refused_by_the_name_of_their_tensor(tmp_path, recipe):
    with pytest.raises(UpdateRefused, match="'w'"):
        verified(tmp_path, with_w(1e30), recipe=recipe)


def test_a_norm_over_the_operators_bound_is_refused(tmp_path):
    bounded = replace(EXPECTED, admission=AdmissionPolicy(max_norm=5.0))
    verified(tmp_path / "short", with_w(1.0), bounded)
    with pytest.raises(UpdateRefused, match="over the bound 5"):
        verified(tmp_path / "long", with_w(2.0), bounded)


@pytest.mark.parametrize("expected", [EXPECTED, INITIAL], ids=["trained", "initial"])
def test_a_variance_below_zero_is_refused(tmp_path, expected):
    with pytest.raises(UpdateRefused, match="running_var"):
        verified(tmp_path, {**MODEL, "bn.running_var": np.full(4, -1.0, np.float32)}, expected)


def test_initial_statistics_may_be_infinite_and_initial_weights_may_not(tmp_path):
    verified(tmp_path / "a", {**MODEL, "bn.running_mean": np.full(4, np.inf, np.float32)}, INITIAL)
    with pytest.raises(UpdateRefused):
        verified(tmp_path / "b", with_w(1e30), INITIAL)


def test_the_norm_of_an_update_is_that_of_its_trained_tensors(tmp_path):
    stored = accept(UploadJournal(tmp_path), "a", with_w(2.0))
    assert norm_of(stored, layout_of(MODEL), plain=True, kept=None) == pytest.approx(2.0 * np.sqrt(12))
