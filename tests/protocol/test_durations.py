import hypothesis.strategies as st
import pytest
from hypothesis import given

from fedgrpc.protocol import durations


@given(st.floats(0, 1e8))
def test_a_duration_comes_back_to_the_nanosecond(seconds):
    assert durations.duration_from_proto(durations.duration_to_proto(seconds)) == pytest.approx(
        seconds, abs=1e-8, rel=1e-9
    )


def test_a_duration_before_zero_is_written_correctly_and_read_as_zero():
    message = durations.duration_to_proto(-1.5)
    assert (message.seconds, message.nanos) == (-1, -500_000_000)
    assert durations.duration_from_proto(message) == 0
