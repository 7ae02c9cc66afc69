"""Who may upload now, and when the others are to come back."""

import heapq
import random

import pytest

from fedgrpc.aggregator.upload_queue import UploadQueue
from fedgrpc.errors import Exhausted


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def refusal(queue, token):
    with pytest.raises(Exhausted) as caught:
        queue.enter(token)
    return caught.value


def serve(queue, clock, count, seconds):
    """So many uploads that follow each other, `seconds` apart, while all slots are taken."""
    for number in range(count):
        refusal(queue, f"served {number}")
        clock.now += seconds
        queue.leave()
        queue.enter(f"served {number}")


def test_whoever_finds_a_place_takes_it(clock):
    queue = UploadQueue(2, clock)
    queue.enter("a")
    queue.enter("b")
    assert "2 uploads are running; try again in" in str(refusal(queue, "c"))
    queue.leave()
    queue.enter("c")


def test_who_is_refused_is_told_to_come_when_those_before_it_were_served(clock):
    queue = UploadQueue(2, clock)
    queue.enter("a")
    queue.enter("b")
    serve(queue, clock, 20, 0.5)
    waits = [refusal(queue, token).retry_after_s for token in "cdef"]
    # 20 slots in 9.5 s, so the next at about half a second each, and nobody is to come too late.
    assert waits == pytest.approx([0.38, 0.76, 1.14, 1.52])
    assert "2 uploads are running and 4 wait; try again in 1.9 s" in str(refusal(queue, "g"))


def test_a_free_place_is_kept_for_one_whose_time_has_come(clock):
    queue = UploadQueue(1, clock)
    queue.enter("a")
    wait_s = refusal(queue, "b").retry_after_s
    clock.now += wait_s
    queue.leave()
    refusal(queue, "newcomer")
    queue.enter("b")


def test_a_place_is_not_kept_for_one_whose_time_has_not_come(clock):
    queue = UploadQueue(1, clock)
    queue.enter("a")
    refusal(queue, "b")
    queue.leave()
    queue.enter("newcomer")


def test_a_place_is_not_kept_for_one_who_does_not_come(clock):
    queue = UploadQueue(1, clock)
    queue.enter("a")
    clock.now += refusal(queue, "b").retry_after_s + 2.5
    queue.leave()
    queue.enter("newcomer")
    assert queue.waiting_count == 0


def test_asking_again_before_its_time_changes_nothing(clock):
    queue = UploadQueue(1, clock)
    queue.enter("a")
    serve(queue, clock, 10, 2.0)
    first = refusal(queue, "b").retry_after_s
    refusal(queue, "c")
    clock.now += 0.5
    assert queue.wait_s("b") == refusal(queue, "b").retry_after_s == pytest.approx(first - 0.5)


def test_who_comes_in_time_and_still_finds_no_place_is_before_all_who_came_later(clock):
    queue = UploadQueue(1, clock)
    queue.enter("a")
    serve(queue, clock, 10, 1.0)
    told_s = refusal(queue, "b").retry_after_s
    for number in range(50):
        refusal(queue, f"later {number}")
    clock.now += told_s
    assert refusal(queue, "b").retry_after_s < 2.5 < refusal(queue, "new").retry_after_s


def test_as_long_as_no_upload_has_ended_the_wait_grows_with_the_time_they_take(clock):
    queue = UploadQueue(4, clock)
    for token in "abcd":
        queue.enter(token)
    assert refusal(queue, "e").retry_after_s < 0.1
    clock.now += 60.0
    assert refusal(queue, "e").retry_after_s == pytest.approx(15.0)


def test_nobody_is_sent_away_for_more_than_five_minutes(clock):
    queue = UploadQueue(1, clock)
    queue.enter("a")
    clock.now += 10_000.0
    assert refusal(queue, "b").retry_after_s == 300.0


def test_turns_of_a_round_that_has_ended_are_nobodys(clock):
    queue = UploadQueue(1, clock)
    queue.enter("a")
    for token in "bcd":
        refusal(queue, token)
    for token in "bd":
        queue.forget(token)
    assert queue.waiting_count == 1


@pytest.mark.parametrize(("count", "upload_s"), [(1000, 0.5), (1000, 0.05), (10_000, 1.0), (200, 90.0)])
def test_a_whole_fleet_at_once_is_served_without_a_pause_and_refused_only_a_few_times(clock, count, upload_s):
    """All come within two seconds, and again when they are told, a little late; one in ten never comes again."""
    rng = random.Random(0)
    queue = UploadQueue(64, clock)
    events = [(clock.now + rng.uniform(0, 2), 1, f"t{number}") for number in range(count)]
    heapq.heapify(events)
    gone = {f"t{number}" for number in range(count) if rng.random() < 0.1}
    refusals, served = 0, 0
    while events:
        clock.now, kind, token = heapq.heappop(events)
        if kind == 0:
            queue.leave()
            served += 1
            continue
        try:
            queue.enter(token)
        except Exhausted as refused:
            refusals += 1
            if token not in gone:
                late_s = rng.expovariate(20)
                heapq.heappush(events, (clock.now + refused.retry_after_s + late_s, 1, token))
        else:
            heapq.heappush(events, (clock.now + upload_s * rng.uniform(0.7, 1.3), 0, token))
    assert served >= count - len(gone)
    assert refusals < 5 * count
    assert clock.now - 1000.0 < 1.2 * served * upload_s / 64 + 3 * upload_s + 4
