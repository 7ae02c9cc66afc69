"""Rounds with secure sums: random devices that die at any moment, and what the machine makes of it."""

import numpy as np
import pytest

from fedgrpc.aggregator.secure_sums import unmasked_sum
from fedgrpc.errors import FedgrpcError, UpdateRefused
from fedgrpc.privacy.neighbours import threshold_of
from fedgrpc.privacy.one_time_keys import Secrets
from fedgrpc.privacy.secure_round import SecurePhase, TellRoster
from fedgrpc.privacy.secure_sum import Circle
from fedgrpc.privacy.secure_task import SecureTask
from fedgrpc.privacy.secure_vector import SecureVector
from fedgrpc.rounds.events import Abort, Commit, Failed, Finished, Rejected, Select, Selected, TaskPhase, Tick
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.rounds.round import RoundPhase
from fedgrpc.runs.events import (
    Ended,
    Ending,
    PartsSent,
    RoundOpened,
    RunPhase,
    TasksGiven,
    UpdateAccepted,
    WorkerPolled,
)
from fedgrpc.runs.machine import RunMachine
from fedgrpc.runs.rules import RunRules
from fedgrpc.runs.secure_sum import SecureSum
from fedgrpc.runs.task_context import TaskContext
from tests.support.run_scenario import REPORT, ListedFleet, RunScenario

NAMES = "abcdefg"
VECTOR = SecureVector({"w": (2,)}, {"w": 1.0}, 8, 0, len(NAMES))


class SecureScenario(RunScenario):
    """A run whose rounds have secure sums, and the devices as they themselves act."""

    def __init__(self, names=NAMES, **policy):
        super().__init__(names)
        policy = {"min_workers": 3, "quorum": 3, "selection_window_s": 0.0, "deadline_s": 100.0, **policy}
        self.machine = RunMachine(RunRules(RoundPolicy(lease_s=10.0, **policy), 10, secure=True), "run", 0.0)
        self.fleet, self.effects = ListedFleet(names), []
        self.secrets = {name: Secrets(name.encode() * 32) for name in names}
        self.devices = {}
        self.model()

    def __call__(self, event):
        effects = super().__call__(event)
        self.effects += effects
        return effects

    def poll(self, names):
        for name in names:
            self(WorkerPolled(name, None, keys=self.secrets[name].public))
        return self

    def begin(self, refused=""):
        """Open a round with a task for each idle worker, of which `refused` have keys that nobody takes."""
        self(RoundOpened(self.machine.next_step(0.0, self.now).round))
        select = next(
            each for each in self(self.machine.workers_available(self.fleet, self.now)) if isinstance(each, Select)
        )
        names = self.machine.idle_trainers(self.fleet, self.now)[: select.count]
        keys = {name: self.machine.keys[name] for name in names if name not in refused}
        rng = np.random.default_rng(0)
        about = {"least": 3, "phase_s": 10.0, "now": self.now}
        sum_ = SecureSum.opened(keys, VECTOR, b"common", rng, threshold=threshold_of(len(keys) - 1), **about)
        tasks = tuple((self.token(name), name) for name in names)
        refused = {self.token(name): "no keys" for name in names if name not in keys}
        self(TasksGiven(Selected(tasks), {token: TaskContext() for token, _ in tasks}, sum_, refused))
        names = [name for name in names if name in keys]
        for name in names:
            around = {other: keys[other] for other in sum_.state.graph[name]}
            circle = Circle(sum_.state.session, name, around, sum_.state.points, sum_.state.thresholds[name])
            self.devices[name] = SecureTask(circle, self.secrets[name])
        return self

    @property
    def sum(self):
        return self.machine.current.secure

    def say(self, name):
        """Let a device do what comes next for it; nothing where it waits."""
        state, device, token = self.sum.state, self.devices[name], self.token(name)
        if state.phase is SecurePhase.SHARING:
            self(PartsSent(token, SecurePhase.SHARING, device.sealed_shares()))
        elif state.phase is SecurePhase.MASKING and name in state.roster:
            self.devices[name] = device.with_roster(state.roster, state.boxes_for(name)).with_masked(b"1" * 32)
            self(UpdateAccepted(token, 1.0, REPORT))
        elif self.sum.asks(name) and state.phase is SecurePhase.CONFIRMING:
            self.devices[name] = device.with_question(state.arrived)
            self(PartsSent(token, SecurePhase.CONFIRMING, self.devices[name].confirmations()))
        elif self.sum.asks(name):
            self(PartsSent(token, SecurePhase.ANSWERING, device.answer(state.proofs_for(name))))

    def pass_time(self):
        """Let the time come for which the machine asks to be woken."""
        self.now = max(self.now, self.machine.wake_at)
        self(Tick())

    def look(self):
        self(self.machine.workers_available(self.fleet, self.now))

    @property
    def commits(self):
        return [effect for effect in self.effects if isinstance(effect, Commit)]


def test_only_workers_with_keys_are_asked_and_each_key_is_for_one_sum():
    scenario = SecureScenario().poll("abcd")
    assert scenario.machine.workers_available(scenario.fleet, 0.0).idle
    scenario.begin()
    assert {task.worker for task in scenario.machine.current.state.tasks.values()} == set("abcd")
    assert not scenario.machine.keys
    # Nobody joins, however many are idle.
    scenario.poll("efg")
    assert scenario.machine.workers_available(scenario.fleet, 0.0).idle == ()


def test_a_task_without_keys_is_lost_in_the_moment_in_which_the_others_are_given():
    scenario = SecureScenario().poll("abcd").begin(refused="d")
    # What a restart would find is what devices are told: no task is there of which nothing could be said.
    tasks = {task.worker: task for task in scenario.machine.current.state.tasks.values()}
    assert tasks["d"].phase is TaskPhase.REJECTED
    assert tasks["d"].reason == "no keys"
    assert scenario.machine.task_of("d") is None
    for name in "abc":
        assert scenario.machine.task_of(name) == scenario.token(name)
        scenario.say(name)
    assert scenario.sum.phase is SecurePhase.MASKING


@pytest.mark.parametrize("seed", range(60))
def test_a_sum_is_committed_once_all_masks_can_be_taken_away_or_its_round_is_abandoned(seed):
    rng = np.random.default_rng(seed)
    scenario = SecureScenario().poll(NAMES).begin()
    dead, steps = set(), 0
    while not scenario.machine.current.state.phase.final and not scenario.commits:
        steps += 1
        assert steps < 400, f"seed {seed} hangs in {scenario.sum.phase}"
        living = [name for name in NAMES if name not in dead]
        kind = rng.random()
        if kind < 0.04 and living:
            dead.add(str(rng.choice(living)))
        elif kind < 0.07 or not living:
            scenario.pass_time()
        elif kind < 0.2:
            scenario.look()
        else:
            try:
                scenario.say(str(rng.choice(living)))
            except FedgrpcError:
                assert dead or steps, f"seed {seed}"
    state = scenario.machine.current.state
    if scenario.commits:
        (commit,) = scenario.commits
        assert scenario.sum.phase is SecurePhase.ANSWERED
        assert state.phase is RoundPhase.COMMITTING
        assert {state.tasks[token].worker for token in commit.tokens} == scenario.sum.state.arrived
        unmask = scenario.sum.state
        unmask.unmasking.masks(unmask.arrived, unmask.answers, VECTOR.sum_bits)
    else:
        assert state.phase is RoundPhase.ABANDONED
        assert state.reason
        assert dead or scenario.now >= 10.0


def test_who_shares_too_late_loses_its_task_and_the_others_go_on():
    scenario = SecureScenario().poll("abcd").begin()
    for name in "abc":
        scenario.say(name)
    scenario.pass_time()
    assert any(isinstance(effect, TellRoster) for effect in scenario.effects)
    task = scenario.machine.current.state.find("d1")
    assert (task.phase, "secure sum" in task.reason) == (TaskPhase.FAILED, True)
    with pytest.raises(UpdateRefused):
        scenario(UpdateAccepted("d1", 1.0, REPORT))


@pytest.mark.parametrize("shares", [True, False])
def test_nobody_waits_for_the_shares_of_one_that_gave_its_task_back(shares):
    scenario = SecureScenario().poll("abcd").begin()
    if shares:
        scenario.say("d")
    scenario.say("a")
    scenario(Failed("d1", "its --min-batch-size"))
    for name in "bc":
        assert scenario.sum.phase is SecurePhase.SHARING
        scenario.say(name)
    assert scenario.sum.state.roster == set("abc")


def test_who_gives_its_task_back_last_keeps_nobody_waiting():
    scenario = SecureScenario().poll("abcd").begin()
    for name in "abc":
        scenario.say(name)
    scenario(Failed("d1", "its --min-batch-size"))
    assert scenario.sum.state.roster == set("abc")


def test_a_round_whose_sum_is_lost_is_abandoned_with_the_reason():
    scenario = SecureScenario().poll("abcd").begin()
    scenario.say("a")
    scenario.pass_time()
    assert any(isinstance(effect, Finished) and not effect.committed for effect in scenario.effects)
    assert any(isinstance(effect, Finished) and "fewer than 3" in effect.reason for effect in scenario.effects)


def arrived(names="abcde"):
    scenario = SecureScenario().poll(names).begin()
    for _ in range(2):
        for name in names:
            scenario.say(name)
    return scenario


def test_an_update_that_is_withdrawn_before_the_question_is_not_in_the_sum():
    scenario = SecureScenario().poll("abcdef").begin()
    for name in "abcdef":
        scenario.say(name)
    for name in "abcde":
        scenario.say(name)
    scenario(Rejected("a1", "its device is revoked", withdrawn=True))
    assert scenario.sum.state.uploaded == set("bcde")
    scenario.now = scenario.machine.current.state.deadline_at
    scenario(Tick())
    assert scenario.sum.state.arrived == set("bcde")


def test_a_sum_that_lacks_one_of_its_updates_is_lost_before_any_is_read():
    scenario = arrived("abcd")
    with pytest.raises(UpdateRefused, match="of its 4 updates 3 are here"):
        unmasked_sum(scenario.sum, ("a1", "b1", "c1"), None)


def test_a_run_that_is_stopped_while_devices_are_asked_waits_for_none_of_them():
    scenario = arrived()
    assert scenario.sum.phase is SecurePhase.CONFIRMING
    assert scenario.machine.current.state.phase is RoundPhase.COMMITTING
    assert not scenario.commits
    scenario(Ended(RunPhase.STOPPED, Ending(text="stopped")))
    assert scenario.machine.current.state.phase is RoundPhase.ABANDONED


def test_a_run_may_be_stopped_after_a_round_was_abandoned_whose_devices_were_asked():
    """Before the shell has noted the end of that round."""
    scenario = arrived()
    scenario(Abort("nobody waits for it"))
    scenario(Ended(RunPhase.STOPPED, Ending(text="stopped")))
    assert scenario.machine.ended
    assert scenario.machine.current.state.reason == "nobody waits for it"


def test_foreseeing_a_message_changes_nothing():
    scenario = SecureScenario().poll("abcd").begin()
    before = scenario.sum
    event = PartsSent("a1", SecurePhase.SHARING, scenario.devices["a"].sealed_shares())
    assert scenario.machine.foresee(event, 0.0).current.secure.state.boxes.keys() == {"a"}
    assert scenario.sum is before
