import random

import pytest

from fedgrpc.errors import LayoutError, LinkError
from fedgrpc.rpc.retry import Backoff, Retries, with_retries


def test_the_ceiling_doubles_up_to_the_cap_and_never_overflows():
    backoff = Backoff(first_s=1, cap_s=10)
    assert [backoff.ceiling_s(attempt) for attempt in range(6)] == [1, 2, 4, 8, 10, 10]
    assert backoff.ceiling_s(10**9) == 10


def test_waits_fill_the_whole_range_below_the_ceiling():
    backoff = Backoff(first_s=4, cap_s=4)
    waits = [Retries(backoff, random.Random(seed)).next_delay_s() for seed in range(1000)]
    assert min(waits) < 0.1
    assert max(waits) > 3.9
    assert sum(waits) / len(waits) == pytest.approx(2, abs=0.15)


def test_a_success_starts_the_waits_over():
    retries = Retries(Backoff(first_s=1, cap_s=1000), random.Random(0))
    for _ in range(10):
        retries.next_delay_s()
    retries.reset()
    assert retries.next_delay_s() <= 1


@pytest.mark.parametrize("bad", [{"first_s": 0}, {"first_s": 2, "cap_s": 1}, {"factor": 0.5}])
def test_a_backoff_that_would_spin_is_refused(bad):
    with pytest.raises(ValueError, match="first_s"):
        Backoff(**bad)


class Flaky:
    def __init__(self, failures, error):
        self.calls, self.failures, self.error = 0, failures, error

    async def __call__(self):
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error
        return "done"


FAST = Backoff(first_s=0.001, cap_s=0.002)


async def test_a_call_that_fails_twice_succeeds_at_the_third_try():
    call = Flaky(2, LinkError("down"))
    assert await with_retries(call, attempts=3, backoff=FAST) == "done"
    assert call.calls == 3


async def test_retries_end_and_raise_the_last_failure():
    call = Flaky(99, LinkError("down"))
    with pytest.raises(LinkError):
        await with_retries(call, attempts=3, backoff=FAST)
    assert call.calls == 3


async def test_an_error_that_trying_again_cannot_cure_is_raised_at_once():
    call = Flaky(99, LayoutError("wrong shape"))
    with pytest.raises(LayoutError):
        await with_retries(call, attempts=3, backoff=FAST)
    assert call.calls == 1
