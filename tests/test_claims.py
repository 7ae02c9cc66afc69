"""Ranges of claims: what is refused, what is bounded, and that sums of them fit a message."""

from __future__ import annotations

import math

import pytest
from google.protobuf import duration_pb2
from hypothesis import given
from hypothesis import strategies as st

from fedgrpc import claims
from fedgrpc.aggregation.mean import mean_metrics
from fedgrpc.errors import LayoutError
from fedgrpc.protocol.devices import bounded_registration
from fedgrpc.protocol.durations import duration_from_proto
from fedgrpc.protocol.records import history_from_bytes, metrics_from_proto
from fedgrpc.rounds.history import WorkerHistory
from fedgrpc.rounds.selection import OortRule, utilities
from fedgrpc.submodels.cost import DeviceLimits, Observation, predict
from fedgrpc.submodels.plan_size import PlanSize
from fedgrpc.v1 import aggregator_pb2, device_pb2, round_pb2

RANGES = [item for item in vars(claims).values() if isinstance(item, claims.Range)]
ANY = st.integers(0, 2**64 - 1) | st.floats()
MOST = 2**64 - 1


@given(st.sampled_from(RANGES), ANY)
def test_a_clamped_claim_lies_in_its_range_whatever_was_claimed(range_, value) -> None:
    assert range_.least <= range_.clamped(value) <= range_.most


@given(st.sampled_from(RANGES), ANY)
def test_a_checked_claim_is_returned_as_it_is_or_refused(range_, value) -> None:
    try:
        assert range_.checked(value) == value
    except LayoutError:
        assert not range_.least <= value <= range_.most


@pytest.mark.parametrize("range_", RANGES, ids=lambda range_: range_.name)
def test_a_million_of_the_largest_claims_can_be_added_and_two_multiplied(range_) -> None:
    assert math.isfinite(1e6 * float(range_.most) * float(claims.WEIGHT.most))


@given(
    st.sampled_from([item for item in RANGES if isinstance(item.most, int)]),
    st.lists(st.integers(0, MOST), max_size=5),
)
def test_a_sum_saturates(range_, values) -> None:
    assert range_.total(values) == min(sum(values), range_.most)


@given(st.text(), st.integers(1, 50))
def test_a_cleaned_text_is_one_printable_line_of_its_length(text, most) -> None:
    cleaned = claims.Text(most).cleaned(text)
    assert cleaned.isprintable()
    assert len(cleaned) <= most
    assert cleaned == " ".join(cleaned.split()) or cleaned.endswith(" ")


def test_a_text_keeps_what_people_write() -> None:
    assert (
        claims.REASON.cleaned("Größe: 4\u202f000 – \u00e7a va, 树莓派 [/x]") == "Größe: 4 000 – ça va, 树莓派 [/x]"
    )


@pytest.mark.parametrize("text", ["\x1b]0;PWNED\x07", "a\u202eb", "a\nb", "\x9b2J", "\ud800"])
def test_what_a_terminal_obeys_becomes_blanks(text) -> None:
    assert claims.printable(text).isprintable()


@pytest.mark.parametrize("name", ["", "a" * 65, "a\nb", "\x1b[2J"])
def test_a_metric_is_called_by_a_short_printable_name(name) -> None:
    with pytest.raises(LayoutError, match="printable"):
        metrics_from_proto({name: 0.5})


@pytest.mark.parametrize("value", [math.nan, math.inf, 1.7e308, -1e31])
def test_a_score_is_a_bounded_number(value) -> None:
    with pytest.raises(LayoutError, match="loss"):
        metrics_from_proto({"loss": value})


def test_a_wait_is_no_longer_than_the_longest_time() -> None:
    assert duration_from_proto(duration_pb2.Duration(seconds=315_576_000_000)) == claims.SECONDS.most


def test_the_profile_of_a_device_is_bounded_and_an_honest_one_stays_as_it_is() -> None:
    honest = device_pb2.DeviceProfile(device_class="pi-4", cpu_cores=4, memory_bytes=8 << 30, on_battery=True)
    told = aggregator_pb2.RegisterRequest(worker="a", device=honest, encodings=["int8", "raw"])
    assert bounded_registration(told) == told
    told.device.memory_bytes, told.device.uplink_bits_per_second = MOST, MOST
    bounded = bounded_registration(told).device
    assert (bounded.memory_bytes, bounded.uplink_bits_per_second) == (1 << 50, 10**16)


def test_a_history_of_any_numbers_is_read_within_bounds() -> None:
    kept = round_pb2.WorkerHistory(
        timings=[round_pb2.PastTiming(local_seconds=math.inf, upload_seconds=math.nan)] * 40,
        loss=1.7e308,
        example_count=MOST,
        selected_in=MOST,
        uplink_bytes_per_second=[math.inf],
    )
    history = history_from_bytes(kept.SerializeToString(), 1, 1)
    assert len(history.timings) == 16
    assert history.loss == claims.SCORE.most
    assert math.isfinite(sum(utilities({"a": history, "b": WorkerHistory(loss=0.1)}, 7, OortRule()).values()))


@given(
    share=st.floats(0, 1),
    seconds=st.floats(0, claims.SECONDS.most),
    size_bytes=st.integers(0, claims.MEMORY_BYTES.most),
)
def test_predictions_from_any_claims_are_numbers(share, seconds, size_bytes) -> None:
    seen = Observation(share, 1, seconds, seconds, seconds, size_bytes, size_bytes, size_bytes, size_bytes)
    expected = predict(DeviceLimits(), [seen], PlanSize(1.0, 1000, 1000, 1000))
    assert math.isfinite(expected.total_s)
    assert math.isfinite(expected.peak_memory_bytes)


def test_names_that_one_worker_makes_up_do_not_push_out_those_of_the_others() -> None:
    junk = {f"a{number:02}": 1.0 for number in range(64)}
    mean = mean_metrics([({"accuracy": 0.5, "loss": 1.0}, 1.0), (junk, 1e12)])
    assert mean["accuracy"] == 0.5
    assert len(mean) == 64
