import math

import pytest

from fedgrpc.errors import LayoutError
from fedgrpc.protocol import records
from fedgrpc.v1 import device_pb2


def test_timings_come_back_equal():
    timings = records.Timings(1.5, 2.5, 3.5, 4.5)
    assert records.timings_from_proto(records.timings_to_proto(timings)) == timings


@pytest.mark.parametrize("seconds", [-1, math.nan, math.inf])
def test_an_impossible_timing_is_refused(seconds):
    with pytest.raises(LayoutError, match="timing"):
        records.timings_from_proto(device_pb2.Timings(upload_seconds=seconds))


@pytest.mark.parametrize(
    "metrics", [{"loss": math.nan}, {"": 1.0}, {"x" * 65: 1.0}, {f"m{i}": 1.0 for i in range(65)}]
)
def test_metrics_without_a_short_name_and_a_finite_value_are_refused(metrics):
    with pytest.raises(LayoutError, match="metric"):
        records.metrics_from_proto(metrics)
