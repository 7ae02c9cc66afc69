"""How each update counts in a commit: no claim raises its weight, and the same updates give the same merge."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from fedgrpc.aggregation.admission import AdmissionPolicy
from fedgrpc.errors import UnusableUpdate, UpdateRefused
from fedgrpc.protocol.updates import report_from_proto
from fedgrpc.rounds.policy import TaskKind
from fedgrpc.runs.events import UpdateAccepted
from fedgrpc.runs.merge import Merge
from fedgrpc.runs.task_context import Report
from fedgrpc.runs.weighing import Weighing
from fedgrpc.training_plan import TrainingPlan
from fedgrpc.v1.aggregator_pb2 import UpdateHeader
from tests.support.run_scenario import REPORT, RunScenario

PLAIN = replace(REPORT, example_count=100, merged_updates=0)


def weight(weighing: Weighing, noise_ratio: float) -> float:
    return weighing.weight_of(TaskKind.TRAIN, "pi", replace(PLAIN, noise_ratio=noise_ratio), ())


def test_noise_lowers_the_weight_of_examples_and_of_an_operators_choice_alike() -> None:
    assert weight(Weighing({}), 0.0) == 100
    assert weight(Weighing({}), 3.0) == 25
    assert weight(Weighing({"pi": 8.0}), 3.0) == 2


def test_plain_weights_know_no_noise() -> None:
    assert weight(Weighing({}, by_noise=False), 3.0) == 100


@pytest.mark.parametrize(
    ("claimed", "counted"), [(-5.0, 0.0), (math.nan, 0.0), (math.inf, 1e6), (1e300, 1e6), (2.5, 2.5)]
)
def test_whatever_noise_a_device_claims_it_never_weighs_more_than_without(claimed: float, counted: float) -> None:
    report = report_from_proto(UpdateHeader(example_count=100, noise_ratio=claimed), AdmissionPolicy())
    assert report.noise_ratio == counted
    assert 0 < Weighing({}).weight_of(TaskKind.TRAIN, "pi", report, ()) <= 100


def test_a_mean_of_a_leaf_has_its_noise_in_its_weight_already() -> None:
    header = UpdateHeader(example_count=100, noise_ratio=4.0, merged_updates=3, weight=60.0)
    assert report_from_proto(header, AdmissionPolicy()).noise_ratio == 0


def merged(weighing: Weighing, norms: dict[str, float] | None = None, **reports: Report) -> Merge:
    """The merge of a round in which workers of these names sent these reports."""
    run = RunScenario("".join(reports)).model().open()
    for worker, report in reports.items():
        run(UpdateAccepted(f"{worker}1", 1.0, report))
    tokens = [f"{worker}1" for worker in reports]
    return weighing.merge(run.machine.current, tokens, norms=norms or {})


def of(examples: int, **changes: object) -> Report:
    return replace(REPORT, example_count=examples, **changes)  # type: ignore[arg-type]


def test_updates_weigh_their_examples_within_the_operators_bounds() -> None:
    assert merged(Weighing({"b": 4.0}, max_examples=20), a=of(10), b=of(50), c=of(50)).weights == {
        "a1": 10.0,
        "b1": 4.0,
        "c1": 20.0,
    }


def test_no_worker_has_more_than_its_share() -> None:
    weights = merged(Weighing({}, max_share=0.5), a=of(10), b=of(10), c=of(980)).weights
    assert max(weights.values()) / sum(weights.values()) <= 0.5 + 1e-9


def test_weights_of_zero_alone_are_refused() -> None:
    with pytest.raises(UpdateRefused, match="zero"):
        merged(Weighing({"a": 0.0, "b": 0.0}), a=of(10), b=of(10))


def test_the_mean_of_a_leaf_weighs_no_more_than_one_update_may() -> None:
    merge = merged(Weighing({}, max_total=15.0), a=of(10), b=of(20))
    assert merge.weights == {"a1": 5.0, "b1": 10.0}


def test_updates_of_unequal_steps_are_scaled_to_the_mean_amount_of_work() -> None:
    weighing = Weighing({}, plan=TrainingPlan(algorithm="fednova"))
    merge = merged(weighing, a=of(10, steps=10), b=of(10, steps=30))
    assert merge.accumulated_steps == 20
    assert merge.scales == pytest.approx({"a1": 2.0, "b1": 2 / 3})
    assert merge.factors == pytest.approx({"a1": 20.0, "b1": 20 / 3})
    with pytest.raises(UnusableUpdate) as caught:
        merged(weighing, a=of(10, steps=10), b=of(10, steps=0))
    assert caught.value.token == "b1"


def test_an_update_longer_than_the_norm_is_scaled_down_to_it() -> None:
    merge = merged(Weighing({}, clip_norm=2.0), {"a1": 1.0, "b1": 8.0}, a=of(10), b=of(10))
    assert merge.scales == {"a1": 1.0, "b1": 0.25}


def test_scores_of_whole_models_come_before_those_of_parts_and_weigh_no_more_than_their_updates() -> None:
    def scored(loss: float, **changes: object) -> Report:
        return of(10, evaluation_metrics={"loss": loss}, evaluation_example_count=1000, **changes)

    both = merged(Weighing({}), a=scored(1.0), b=scored(9.0, scores_of_sub_models=True)).scores
    assert (both.metrics, both.example_count, both.of_sub_models) == ({"loss": 1.0}, 10, False)
    parts = merged(Weighing({}), b=scored(9.0, scores_of_sub_models=True)).scores
    assert (parts.metrics, parts.of_sub_models) == ({"loss": 9.0}, True)
    silent = merged(Weighing({"a": 0.0}), a=scored(1.0), b=scored(3.0)).scores
    assert silent.metrics == {"loss": 3.0}, "who weighs nothing has no say"


def test_steps_that_cannot_be_are_refused_since_others_updates_depend_on_them() -> None:
    weighing = Weighing({}, plan=TrainingPlan(epochs=2.0, max_steps=15))
    weighing.check_steps(of(10, steps=15))
    for steps in (0, 16):
        with pytest.raises(UpdateRefused, match="steps are reported"):
            weighing.check_steps(of(10, steps=steps))
    mean = of(10, merged_updates=3, accumulated_steps=15.0)
    weighing.check_steps(mean)
    with pytest.raises(UpdateRefused, match="accumulated steps"):
        weighing.check_steps(replace(mean, accumulated_steps=16.0))
