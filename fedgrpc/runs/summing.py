"""Rounds whose updates go into a secure sum: the sum follows its round, and the round waits for the sum. Pure.

The rule: nothing is committed before the masks can be taken away, and a round whose sum is lost is abandoned.
`RunMachine` applies the events; this is the part of it that knows of sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fedgrpc.errors import UpdateRefused
from fedgrpc.privacy import secure_round
from fedgrpc.privacy.secure_round import SecurePhase
from fedgrpc.rounds import events as rounds
from fedgrpc.rounds.events import AbandonCause, Abort, Accepted, Commit, Failed, Rejected, TaskPhase, Tick
from fedgrpc.rounds.round import RoundPhase
from fedgrpc.runs.events import Effect, PartsSent
from fedgrpc.runs.round_in_progress import RoundInProgress
from fedgrpc.runs.secure_sum import SecureSum
from fedgrpc.runs.state import RunState

Effects = tuple[Effect, ...]
SecureStep = tuple[SecureSum, tuple[secure_round.Effect, ...]]


class SummingState(RunState):
    """State of a run whose rounds may have secure sums. `RunMachine` alone calls what is here."""

    def step_round(self, event: rounds.Event, now: float) -> Effects:
        """Apply an event to the round in progress: `RunMachine` has it, and alone calls it."""
        raise NotImplementedError

    def _foreseen_sum(self, event: rounds.Event, now: float) -> SecureStep | None:
        """Return the secure sum with an update that arrives. Raises as it does, before anything has happened."""
        sum_ = self.current.secure
        if sum_ is None or not isinstance(event, Accepted):
            return None
        return sum_.step(secure_round.Arrived(self.current.worker_of(event.token)), now)

    def _sum_follows(
        self, effects: Effects, before: RoundInProgress, summed: SecureStep | None, event: rounds.Event, now: float
    ) -> Iterator[Effect]:
        """Let the secure sum follow its round. Nothing is committed before its masks can be taken away."""
        round_ = self.current
        assert round_.secure is not None
        yield from (effect for effect in effects if not isinstance(effect, Commit))
        if summed is not None:
            yield from self._take_sum(summed, now)
        elif isinstance(event, Failed | Rejected) and round_.secure.phase is SecurePhase.SHARING:
            yield from self._step_sum(secure_round.Withdrawn(before.worker_of(event.token)), now)
        elif isinstance(event, Rejected) and before.state.find(event.token).phase is TaskPhase.ACCEPTED:
            yield from self._withdraw(event, now)
        elif isinstance(event, Tick) and round_.secure.is_due(now) and not round_.state.phase.final:
            yield from self._step_sum(secure_round.TimeUp(round_.secure.phase), now)
        closed = before.state.phase is not RoundPhase.COMMITTING
        if closed and self.current.state.phase is RoundPhase.COMMITTING:
            yield from self._step_sum(secure_round.TimeUp(SecurePhase.MASKING), now)
            yield from self._commit_sum()

    def _step_sum(self, event: secure_round.Event, now: float) -> Effects:
        sum_ = self.current.secure
        if sum_ is None:
            raise UpdateRefused("this task is of no secure sum")
        return self._take_sum(sum_.step(event, now), now)

    def _take_sum(self, summed: SecureStep, now: float) -> Effects:
        """Take the secure sum as it is now, and carry out what that asks of the round."""
        sum_, asked = summed
        self.round = replace(self.current, secure=sum_)
        effects: list[Effect] = []
        for effect in asked:
            match effect:
                case secure_round.Abandon(reason):
                    if not self.current.state.phase.final:
                        effects += self.step_round(Abort(reason, AbandonCause.UNUSABLE), now)
                case secure_round.Unmask():
                    effects += self._commit_sum()
                case secure_round.TellRoster(roster):
                    effects += [effect, *self._fail_absent(roster, now)]
                case _:
                    effects.append(effect)
        return tuple(effects)

    def _fail_absent(self, roster: frozenset[str], now: float) -> Effects:
        """Free the workers whose shares did not come: they cannot be in the sum."""
        tasks = self.current.state.tasks.items()
        absent = [token for token, task in tasks if task.worker not in roster and not task.phase.final]
        reason = "its shares of the secure sum did not come in time"
        return tuple(effect for token in absent for effect in self.step_round(Failed(token, reason), now))

    def _commit_sum(self) -> Effects:
        """Commit once the round has closed and the answers are here, whichever is last."""
        round_ = self.current
        assert round_.secure is not None
        ready = round_.secure.phase is SecurePhase.ANSWERED and round_.state.phase is RoundPhase.COMMITTING
        if not ready:
            return ()
        arrived, tasks = round_.secure.state.arrived, round_.state.tasks
        return (Commit(tuple(token for token in round_.state.accepted if tasks[token].worker in arrived)),)

    def _withdraw(self, event: Rejected, now: float) -> Effects:
        """Take an accepted update out of the sum, or abandon the round where that is too late."""
        sum_ = self.current.secure
        assert sum_ is not None
        if sum_.phase is SecurePhase.MASKING:
            return self._step_sum(secure_round.Withdrawn(self.current.worker_of(event.token)), now)
        if self.current.state.phase.final:
            return ()
        return self.step_round(Abort(f"a secure sum cannot do without an update: {event.reason}"), now)

    def _hear_parts(self, event: PartsSent, now: float) -> Effects:
        worker = self.round_of(event.token).worker_of(event.token)
        match event.phase:
            case SecurePhase.SHARING:
                return self._step_sum(secure_round.Shared(worker, event.parts), now)
            case SecurePhase.CONFIRMING:
                return self._step_sum(secure_round.Confirmed(worker, event.parts), now)
            case SecurePhase.ANSWERING:
                return self._step_sum(secure_round.Answered(worker, event.parts), now)
        raise UpdateRefused(f"no parts are sent while a secure sum is {event.phase.name.lower()}")
