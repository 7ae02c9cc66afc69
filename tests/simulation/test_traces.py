"""Availability traces: the format, the generator, and published formats in small."""

from __future__ import annotations

import json
import math
import os
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgrpc.errors import UsageError
from fedgrpc.simulation.devices import Devices
from fedgrpc.simulation.fleet import DeviceKind
from fedgrpc.simulation.trace_sources import Site, diurnal, from_fedscale, from_flash
from fedgrpc.simulation.traces import Trace, trace_of

KIND = DeviceKind("pi", 3, up_mbit=1.0, down_mbit=1.0, train_s=1.0)


def _reachable_at(trace: Trace, device: int, time_s: float) -> bool:
    """What the stretches say, read in the dumbest way."""
    stretches = list(trace.stretches.values())[device % len(trace.stretches)]
    within = time_s % trace.period_s
    return any(from_s <= within < to_s for from_s, to_s in stretches)


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 99), st.integers(1, 40)), min_size=1, max_size=4), min_size=1, max_size=3
    )
)
def test_devices_come_and_go_as_the_trace_says_period_after_period(cuts: list[list[tuple[int, int]]]) -> None:
    stretches = {
        f"d{number}": [(float(start), float(min(100, start + length))) for start, length in each]
        for number, each in enumerate(cuts)
    }
    trace = trace_of(stretches, 100.0)
    devices = Devices((KIND,), 0, trace)
    for time_s in np.arange(0.5, 350.0, 1.0):
        assert [devices.advance_one(device, time_s) for device in range(3)] == [
            _reachable_at(trace, device, time_s) for device in range(3)
        ]


def test_a_device_that_is_always_there_never_changes() -> None:
    trace = trace_of({"d": [(0.0, 60.0), (60.0, 100.0)]}, 100.0)
    changes = trace.changes(0)
    assert changes.reachable
    assert math.isinf(changes.next_change())


def test_a_trace_reads_what_it_writes() -> None:
    trace = diurnal([Site(3), Site(2, 9.0)], 3, seed=4, outages_per_day=1.0)
    assert Trace.parse(trace.to_csv()).to_csv() == trace.to_csv()
    assert len(trace.stretches) == 5
    assert 0.2 < trace.available_share() < 0.6


def test_devices_are_there_at_night_by_the_time_of_their_site() -> None:
    trace = diurnal([Site(50), Site(50, 12.0)], 4, seed=0, day_share=0.0)
    there = [
        sum(_reachable_at(trace, device, (48 + 2) * 3600.0) for device in range(first, first + 50))
        for first in (0, 50)
    ]
    assert there[0] > 40
    assert there[1] < 10


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no stretch"),
        ("device,from_s\n", "header"),
        ("device,from_s,to_s\na,0\n", "line 2"),
        ("device,from_s,to_s\na,0,soon\n", "line 2"),
        ("device,from_s,to_s\na,5,5\n", "empty"),
        ("# period_s = 10\ndevice,from_s,to_s\na,5,20\n", "period"),
        ("# period_s = -1\ndevice,from_s,to_s\na,5,20\n", "period"),
        ("device,from_s,to_s\na,nan,20\n", "line 2"),
    ],
)
def test_a_bad_trace_is_refused_with_the_line(text: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        Trace.parse(text)


def test_fedscales_trace_is_read() -> None:
    # The form of its client_behave_trace.
    clients = {
        3834: {"duration": 20, "inactive": [50, 80], "finish_time": 100, "active": [10, 70], "model": "CPH1801"},
        7: {"duration": 30, "inactive": [40], "finish_time": 100, "active": [0], "model": "x"},
        8: {"duration": 30, "inactive": [40], "finish_time": 300, "active": [0], "model": "x"},
    }
    trace = from_fedscale(pickle.dumps(clients))
    assert trace.period_s == 100
    assert trace.stretches == {"3834": ((10.0, 50.0), (70.0, 80.0)), "7": ((0.0, 40.0),)}


class _Runs:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/never",)


@pytest.mark.parametrize(
    "data",
    [
        *(pickle.dumps({1: _Runs()}), b"", b"garbage", pickle.dumps([1]), pickle.dumps({1: {}})),
        pickle.dumps({1: {"active": [0], "inactive": [1], "finish_time": 10**400}}),
        # A length of 2**63 - 1.
        b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f",
    ],
)
def test_a_pickle_that_is_no_trace_is_refused_and_runs_nothing(data: bytes) -> None:
    with pytest.raises(UsageError):
        from_fedscale(data)


def test_flashs_trace_is_read_as_charging_on_wifi_with_the_screen_off() -> None:
    # The form of its user_behavior files.
    events = [
        "2020-01-31 22:00:00\tscreen_off",
        "2020-01-31 22:30:00\twifi",
        "2020-01-31 23:00:00\tbattery_charged_on",
        "2020-02-01 01:00:00\tscreen_on",
        "2020-02-01 01:30:00\tscreen_off",
        "2020-02-01 06:00:00\t4G",
        "2020-02-01 07:00:00\tbattery_charged_off",
    ]
    trace = from_flash(json.dumps({"0": {"messages": "\n".join(events), "model": "x"}}))
    hours = [(from_s / 3600, to_s / 3600) for from_s, to_s in trace.stretches["0"]]
    assert hours == [(23.0, 25.0), (25.5, 30.0)]
    assert trace.period_s == 2 * 86_400


@pytest.mark.parametrize(
    "text", ["", "[]", "[" * 100_000, '{"0": {}}', '{"0": {"messages": "yesterday\\twifi"}}', "{}"]
)
def test_what_is_no_trace_of_flash_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        from_flash(text)
