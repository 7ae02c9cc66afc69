"""The release of a version: canaries, the rest, and back."""

import math

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fedgrpc.errors import IllegalTransition, UsageError
from fedgrpc.protocol.releases import release_from_proto, release_to_proto, report_to_proto
from fedgrpc.runs.conditions import Condition
from fedgrpc.runs.release import (
    AbortAsked,
    DeviceGone,
    Release,
    ReleasePhase,
    Releases,
    Reported,
    TimePassed,
    canaries_of,
    step,
)

ACCURATE = Condition("accuracy", 0.9)
GOOD, BAD = {"accuracy": 0.95}, {"accuracy": 0.2}


def release_of(*canaries, **changes):
    values = {"conditions": (ACCURATE,), "after_s": 60.0, "within_s": 600.0, "started_at": 0.0, **changes}
    return Release(1, 7, frozenset(canaries), **values)


def told(release, now, **scores):
    for device, score in scores.items():
        release = step(release, Reported(device, score), now)
    return release


def test_canaries_serve_first_and_the_rest_after_their_time():
    release = release_of("a", "b")
    assert [release.serves(device) for device in "abc"] == [True, True, False]
    release = told(release, 10.0, a=GOOD, b=GOOD)
    assert release.next_at == 70.0
    release = step(release, TimePassed(), 69.9)
    assert release.phase is ReleasePhase.CANARY
    release = step(release, TimePassed(), 70.0)
    assert (release.phase, release.serves("c"), release.next_at) == (ReleasePhase.ROLLOUT, True, 130.0)
    release = step(release, TimePassed(), 130.0)
    assert (release.phase, release.next_at) == (ReleasePhase.DONE, math.inf)


def test_the_time_of_the_canaries_runs_from_when_most_of_them_have_reported():
    release = told(release_of("a", "b", "c"), 10.0, a=GOOD)
    assert release.watched_since is None
    release = told(release, 40.0, b=GOOD)
    assert (release.watched_since, release.next_at) == (40.0, 100.0)
    assert told(release, 50.0, a=GOOD, c=GOOD).next_at == 100.0


def test_bad_canaries_take_the_release_back_at_once():
    release = told(release_of("a", "b", "c"), 10.0, a=BAD)
    assert release.phase is ReleasePhase.CANARY
    release = told(release, 11.0, b=BAD)
    assert release.phase is ReleasePhase.ROLLED_BACK
    assert "median accuracy of 2 devices is 0.2, not accuracy>=0.9" in release.reason
    assert not release.serves("a")


def test_canaries_that_turn_bad_later_take_it_back_too():
    release = told(release_of("a"), 10.0, a=GOOD)
    assert told(release, 69.0, a=BAD).phase is ReleasePhase.ROLLED_BACK


def test_canaries_that_do_not_report_in_time_take_it_back():
    release = told(release_of("a", "b", "c"), 10.0, a=GOOD)
    assert release.next_at == 600.0
    release = step(release, TimePassed(), 600.0)
    assert release.phase is ReleasePhase.ROLLED_BACK
    assert "too few" in release.reason


def test_a_canary_that_cannot_use_the_version_counts_as_bad():
    release = step(release_of("a"), Reported("a", {}, "out of memory"), 5.0)
    assert release.phase is ReleasePhase.ROLLED_BACK


def test_devices_of_the_rest_can_take_it_back_as_well():
    release = step(told(release_of("a"), 0.0, a=GOOD), TimePassed(), 60.0)
    assert release.phase is ReleasePhase.ROLLOUT
    release = told(release, 61.0, b=BAD)
    assert release.phase is ReleasePhase.ROLLED_BACK


def test_who_has_no_part_in_it_is_not_heard():
    release = release_of("a")
    assert told(release, 1.0, x=BAD) is not None
    assert told(release, 1.0, x=BAD).reports == {}


def test_a_canary_that_is_revoked_is_waited_for_no_more():
    release = told(release_of("a", "b", "c"), 10.0, a=GOOD)
    release = step(release, DeviceGone("c"), 20.0)
    assert (release.canaries, release.quorum) == ({"a", "b"}, 2)
    release = step(release, DeviceGone("b"), 21.0)
    assert release.next_at == 70.0
    assert step(release, DeviceGone("a"), 22.0).phase is ReleasePhase.ROLLED_BACK


def test_an_operator_ends_it_and_what_has_ended_changes_no_more():
    release = step(release_of("a"), AbortAsked("wrong file"), 5.0)
    assert (release.phase, release.reason) == (ReleasePhase.ABORTED, "wrong file")
    for event in (AbortAsked(""), TimePassed(), Reported("a", GOOD), DeviceGone("a")):
        with pytest.raises(IllegalTransition, match="aborted"):
            step(release, event, 6.0)


def test_after_a_release_is_taken_back_devices_serve_what_they_served_before():
    first = release_of("a", after_s=1.0, within_s=2.0)
    first = step(step(told(first, 0.0, a=GOOD), TimePassed(), 1.0), TimePassed(), 2.0)
    releases = Releases().with_release(first)
    assert releases.wanted("z").version == 7
    second = Release(2, 9, frozenset("a"), (ACCURATE,), 60.0, 600.0, 10.0, previous=7)
    releases = releases.with_release(second)
    assert [releases.wanted(device).version for device in "az"] == [9, 7]
    assert releases.versions == {7, 9}
    releases = releases.with_release(told(second, 11.0, a=BAD))
    assert [releases.wanted(device).version for device in "az"] == [7, 7]
    assert releases.wanted("a").score_interval_s is None


def test_before_any_release_devices_serve_what_they_train_on():
    assert Releases().wanted("a") is None
    aborted = step(release_of("a"), AbortAsked(""), 1.0)
    assert Releases().with_release(release_of("a")).with_release(aborted).wanted("a") is None


@pytest.mark.parametrize(
    ("canary", "count"), [("10%", 1), ("50%", 5), ("100%", 10), ("0.1%", 1), ("3", 3), ("d1, d2", 2)]
)
def test_canaries_are_a_share_a_number_or_names(canary, count):
    devices = [f"d{index}" for index in range(10)]
    chosen = canaries_of(devices, canary, lambda device: -int(device[1:]))
    assert len(chosen) == count
    if "d" not in canary:
        assert chosen == {f"d{9 - index}" for index in range(count)}


@pytest.mark.parametrize("canary", ["0%", "101%", "nan%", "x%", "0", "11", "stranger", "d1,stranger"])
def test_other_canaries_are_refused(canary):
    with pytest.raises(UsageError):
        canaries_of([f"d{index}" for index in range(10)], canary, len)


@pytest.mark.parametrize(
    "changes", [{"after_s": 0.0}, {"after_s": math.nan}, {"after_s": 700.0}, {"within_s": math.inf}]
)
def test_times_out_of_range_are_refused(changes):
    with pytest.raises(UsageError):
        release_of("a", **changes)
    with pytest.raises(UsageError, match="needs a device"):
        release_of()


DEVICES = [f"d{index}" for index in range(6)]


class ReleaseMachine(RuleBasedStateMachine):
    """Any sequence of events, with a restart from the stored form in between."""

    @initialize(canaries=st.sets(st.sampled_from(DEVICES), min_size=1))
    def begin(self, canaries):
        self.now = 1000.0
        self.release = release_of(*canaries, started_at=self.now, entered_at=self.now)
        self.seen = [self.release.phase]

    def take(self, event):
        if not self.release.phase.active:
            with pytest.raises(IllegalTransition):
                step(self.release, event, self.now)
            return
        self.release = step(self.release, event, self.now)
        self.seen.append(self.release.phase)

    @rule(device=st.sampled_from(DEVICES), accuracy=st.floats(0, 1), fails=st.booleans())
    def report(self, device, accuracy, fails):
        self.take(Reported(device, {} if fails else {"accuracy": accuracy}, "no room" if fails else ""))

    @rule(device=st.sampled_from(DEVICES))
    def lose(self, device):
        self.take(DeviceGone(device))

    @rule(seconds=st.floats(0, 700))
    def wait(self, seconds):
        self.now += seconds
        self.take(TimePassed())

    @precondition(lambda self: len(self.seen) > 5)
    @rule()
    def abort(self):
        self.take(AbortAsked("enough"))

    @rule()
    def restart(self):
        stored = release_to_proto(self.release, "")
        reports = [report_to_proto(name, report) for name, report in self.release.reports.items()]
        again = release_from_proto(type(stored).FromString(stored.SerializeToString()), reports)
        assert (again.phase, again.canaries, again.conditions) == (
            *(self.release.phase, self.release.canaries),
            self.release.conditions,
        )
        assert again.reports.keys() == self.release.reports.keys()
        if self.release.phase.active:
            assert again.next_at == pytest.approx(self.release.next_at, abs=1e-5)
        self.release = again

    @invariant()
    def phases_only_go_forward(self):
        if hasattr(self, "seen"):
            assert self.seen == sorted(self.seen, key=lambda phase: phase.value)

    @invariant()
    def nothing_reaches_the_rest_before_most_canaries_were_good_for_their_time(self):
        if hasattr(self, "release") and self.release.phase is ReleasePhase.CANARY:
            assert {device for device in DEVICES if self.release.serves(device)} == self.release.canaries
            assert set(self.release.reports) <= self.release.canaries

    @invariant()
    def who_is_waited_for_has_an_end(self):
        if hasattr(self, "release") and self.release.phase.active:
            assert self.release.next_at <= self.now + 700.0

    @invariant()
    def what_is_taken_back_is_served_by_nobody(self):
        if hasattr(self, "release") and self.release.phase in (ReleasePhase.ROLLED_BACK, ReleasePhase.ABORTED):
            assert not any(map(self.release.serves, DEVICES))
            assert self.release.reason


TestReleaseMachine = ReleaseMachine.TestCase
