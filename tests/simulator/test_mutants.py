"""The simulator bites: break each promise on purpose, in the round or around it, and a seed finds it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from fedgrpc.privacy.ledger import Ledger
from fedgrpc.rounds import transitions
from fedgrpc.rounds.events import (
    Cancel,
    Commit,
    Effect,
    Event,
    Progress,
    Select,
    TaskPhase,
    Tick,
    WorkersAvailable,
)
from fedgrpc.rounds.round import Round, RoundPhase
from fedgrpc.runs.events import ReleaseEntered
from fedgrpc.runs.machine import RunMachine
from fedgrpc.simulation.loop import Process
from tests.simulator.aggregator import Aggregator
from tests.simulator.disk import Disk, Version
from tests.simulator.messages import Held, Push
from tests.simulator.world import World

Effects = tuple[Effect, ...]
_SEEDS = 500


def _found(mutant: type[Aggregator]) -> str:
    """What the first seed that fails says."""
    for seed in range(_SEEDS):
        outcome = World(seed, mutant).play()
        if outcome.violation:
            assert 1 <= len(outcome.trace) <= 40
            return outcome.violation
    return f"nothing in {_SEEDS} seeds"


class CommitsTheVersionBeforeItClosesTheRound(Aggregator):
    """Two transactions where there should be one: killed between them, it commits the round again."""

    def finish_round(self, after: Round, version: Version | None) -> Process[None]:
        if version is not None:
            self.disk.versions.append(version)
            self.world.watch.committed(version, after)
            yield self._disk_time()
        self.disk.finish(after, None)


class WritesTheVersionBeforeItsEntry(Aggregator):
    def release(self, ledger: Ledger, version: Version) -> Process[None]:
        release = ledger.release_of(version.round, version.version, version.tokens)
        self.world.watch.written(version, release.step)
        yield from super().release(ledger, version)


class EntersARecomputedCommitAgain(Aggregator):
    """It does not look whether a process that was killed has entered this sum."""

    def release(self, ledger: Ledger, version: Version) -> Process[None]:
        release = ledger.release_of(version.round, version.version, version.tokens)
        again = replace(release, step=ledger.next_step)
        yield from self.dispatch_after(ReleaseEntered(again), lambda _: self.disk.enter(again))
        self.world.watch.written(version, again.step)


class ForgetsTheClipNorm(Aggregator):
    """A restart begins with the clip norm of the settings again."""

    def opened_ledger(self) -> Ledger:
        ledger = super().opened_ledger()
        return replace(ledger, rules=replace(ledger.rules, clip_norm=1.0))


class CountsAnUpdateTwice(Aggregator):
    def step(self, round_: Round, event: Event, now: float) -> tuple[Round, Effects]:
        after, effects = super().step(round_, event, now)
        return after, tuple(_twice(effect) for effect in effects)


def _twice(effect: Effect) -> Effect:
    return Commit((*effect.tokens, effect.tokens[0])) if isinstance(effect, Commit) else effect


class IgnoresTheQuorum(Aggregator):
    def step(self, round_: Round, event: Event, now: float) -> tuple[Round, Effects]:
        after, effects = super().step(replace(round_, policy=replace(round_.policy, quorum=1)), event, now)
        return replace(after, policy=round_.policy), effects


class ForgetsTheNewVersion(Aggregator):
    def known_version(self) -> int:
        return max(1, super().known_version() - 1)


class TellsAVersionBeforeItIsDurable(Aggregator):
    """A model file that was found, though no transaction says that it counts."""

    def known_version(self) -> int:
        return super().known_version() + 1


class LetsHeartbeatsMoveTheDeadline(Aggregator):
    def step(self, round_: Round, event: Event, now: float) -> tuple[Round, Effects]:
        after, effects = super().step(round_, event, now)
        if isinstance(event, Progress):
            after = replace(after, deadline_at=now + after.policy.deadline_s)
        return after, effects


class LetsATrickleHoldTheRound(Aggregator):
    """The round waits for whoever is uploading."""

    def step(self, round_: Round, event: Event, now: float) -> tuple[Round, Effects]:
        if isinstance(event, Tick) and round_.tokens(TaskPhase.UPLOADING):
            return round_, ()
        return super().step(round_, event, now)


class KeepsEveryFile(Aggregator):
    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.disk = _Hoarder()


class _Hoarder(Disk):
    def discard(self, tokens: Iterable[str]) -> None:
        pass


class AcknowledgesBeforeItIsDurable(Aggregator):
    def _accept(self, push: Push) -> Process[Held]:
        if not push.bad:
            self._acknowledge(push.token, push.total)
        return (yield from super()._accept(push))


class LeavesOutTheLastUpdate(Aggregator):
    def step(self, round_: Round, event: Event, now: float) -> tuple[Round, Effects]:
        after, effects = super().step(round_, event, now)
        return after, tuple(_without_last(effect, round_.policy.quorum) for effect in effects)


def _without_last(effect: Effect, quorum: int) -> Effect:
    if isinstance(effect, Commit) and len(effect.tokens) > quorum:
        return Commit(effect.tokens[:-1])
    return effect


class ForgetsAcceptedUpdatesWhenRestarted(Aggregator):
    def _stored_phase(self, token: str, phase: TaskPhase) -> TaskPhase:
        return TaskPhase.OFFERED


class ForgetsWhatWasAcceptedWhileItCommitted(Aggregator):
    """The next round is opened as if none had been before it."""

    def _follow(self) -> None:
        ended = self.run.current
        self.run.round = replace(ended, state=replace(ended.state, carried={}))
        super()._follow()
        self.run.leases.clear()


class RemovesTheFilesOfCarriedUpdates(Aggregator):
    def _finish(self, finished: object) -> Process[None]:
        tokens = list(self.run.current.state.tasks)
        yield from super()._finish(finished)  # type: ignore[arg-type]
        self.disk.discard(tokens)


class TakesUpdatesHoweverStale(Aggregator):
    def step(self, round_: Round, event: Event, now: float) -> tuple[Round, Effects]:
        blind = replace(round_, policy=replace(round_.policy, max_staleness=100))
        after, effects = super().step(blind, event, now)
        return replace(after, policy=round_.policy), effects

    def _follow(self) -> None:
        rules, policy = self.run.rules, self.world.policy
        self.run.rules = replace(rules, policy=replace(policy, max_staleness=100))
        super()._follow()
        self.run.rules = rules
        if (round_ := self.run.round) is not None:
            self.run.round = replace(round_, state=replace(round_.state, policy=policy))


class AcceptsBeforeItVerifies(Aggregator):
    def _accept(self, push: Push) -> Process[Held]:
        self.disk.seal(push.token)
        return (yield from super()._accept(push))


class NeverWakes(Aggregator):
    def wake_at(self, round_: Round) -> float | None:
        return None


class NeverAsksALostWorkerAgain(Aggregator):
    def start(self) -> None:
        self.lost: set[str] = getattr(self, "lost", set())
        super().start()

    def _carry_out(self, effect: Effect) -> None:
        if isinstance(effect, Cancel):
            self.lost.add(self.run.current.state.tasks[effect.token].worker)
        super()._carry_out(effect)

    def pool(self) -> WorkersAvailable:
        pool = super().pool()
        return WorkersAvailable(tuple(worker for worker in pool.idle if worker not in self.lost), pool.live_count)


class _NeverFrees(RunMachine):
    def _release(self, worker: str, token: str) -> None:
        pass


class NeverFreesAWorker(Aggregator):
    """Whoever has held a task holds it for good."""

    run_class = _NeverFrees


class LosesLeasesWhenRestarted(Aggregator):
    """Workers that come back are nobody's: they are given other tasks beside their own."""

    def recover(self) -> None:
        super().recover()
        self.run.leases.clear()


class ForgetsCarriedTasksWhenRestarted(Aggregator):
    def recover(self) -> None:
        if self.disk.open is None:
            self.disk.rows = {
                token: row for token, row in self.disk.rows.items() if row.round <= self.disk.last_number
            }
        super().recover()


class RemovesUpdatesBeforeTheirVersionIsStored(Aggregator):
    """The commit order: what a version is made of goes first."""

    def finish_round(self, after: Round, version: Version | None) -> Process[None]:
        self.disk.discard(version.tokens if version is not None else ())
        yield from super().finish_round(after, version)


MUTANTS: list[tuple[type[Aggregator], str]] = [
    (CommitsTheVersionBeforeItClosesTheRound, "counted once"),
    (CountsAnUpdateTwice, "counted once"),
    (IgnoresTheQuorum, "quorum"),
    (ForgetsTheNewVersion, "versions grow"),
    (TellsAVersionBeforeItIsDurable, "versions grow"),
    (LetsHeartbeatsMoveTheDeadline, "ends on time"),
    (LetsATrickleHoldTheRound, "ends on time"),
    (NeverWakes, "ends on time"),
    (KeepsEveryFile, "bound held"),
    (AcknowledgesBeforeItIsDurable, "nothing lost"),
    (LeavesOutTheLastUpdate, "nothing lost"),
    (ForgetsAcceptedUpdatesWhenRestarted, "nothing lost"),
    (ForgetsWhatWasAcceptedWhileItCommitted, "nothing lost"),
    (RemovesTheFilesOfCarriedUpdates, "no surprise"),
    (TakesUpdatesHoweverStale, "bound held"),
    (AcceptsBeforeItVerifies, "none refused"),
    (NeverAsksALostWorkerAgain, "goes on"),
    (NeverFreesAWorker, "no surprise"),
    (LosesLeasesWhenRestarted, "goes on"),
    (ForgetsCarriedTasksWhenRestarted, "nothing lost"),
    (RemovesUpdatesBeforeTheirVersionIsStored, "nothing lost"),
    (WritesTheVersionBeforeItsEntry, "ledger: 0 entries"),
    (EntersARecomputedCommitAgain, "ledger"),
    (ForgetsTheClipNorm, "ledger: step"),
]


@pytest.mark.parametrize(("mutant", "invariant"), MUTANTS, ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_promise_is_found(mutant: type[Aggregator], invariant: str) -> None:
    found = _found(mutant)
    assert found.startswith(invariant), found


def _replace_all(round_: Round, event: WorkersAvailable, now: float) -> tuple[Round, Effects]:
    count = round_.aim - len(round_.accepted)
    if round_.asked or all(worker in round_.workers for worker in event.idle):
        return round_, ()
    return replace(round_, asked=count), (Select(count, round_.workers),)


def test_a_round_that_replaces_workers_who_are_at_work_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        transitions, "_TABLE", {**transitions._TABLE, (RoundPhase.REPORTING, WorkersAvailable): _replace_all}
    )
    found = _found(Aggregator)
    assert found.startswith("bound held"), found


def test_a_round_that_lets_stale_updates_make_a_quorum_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Round, "accepted_count", property(lambda round_: len(round_.accepted)))
    found = _found(Aggregator)
    assert found.startswith("quorum"), found
