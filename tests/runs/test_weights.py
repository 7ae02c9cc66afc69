"""What an update weighs: no claim raises it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from fedgrpc.aggregation.admission import AdmissionPolicy
from fedgrpc.protocol.updates import report_from_proto
from fedgrpc.rounds.policy import TaskKind
from fedgrpc.runs.weights import Weighing
from fedgrpc.v1.aggregator_pb2 import UpdateHeader
from tests.support.run_scenario import REPORT

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
