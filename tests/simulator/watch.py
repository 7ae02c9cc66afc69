"""What must hold after every event, whatever goes wrong.

    counted once     no update is in two versions, or twice in one; no worker has two from one model
    quorum           a committed round has its quorum, all of it from its own tasks
    versions grow    each committed version is the one after the last; no worker is told one that is not durable
    ends on time     no round outlives its deadline plus grace, and after a restart the time to reconnect
    bound held       no more tasks at work than asked for, no more files than a worker's two, no update too stale
    none refused     a refused update is in no version
    nothing lost     an acknowledged update is in its round's model, or in the next's if it was carried
    ledger           a version is written after its one entry; the noise of a step is that of one sum; the clip
                     norm of a round follows from the entry of the round before
    no surprise      nothing raises that nobody expects
    goes on          once the faults have stopped, a round commits

The rule: it counts for itself, and believes nothing that the watched say of themselves.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from fedgrpc.privacy.ledger import digest_of
from fedgrpc.rounds.events import Effect, Event, Offer, Select, TaskPhase
from fedgrpc.rounds.round import Round, RoundPhase
from tests.simulator.disk import Version
from tests.simulator.messages import Assignment, UpdateId

if TYPE_CHECKING:
    from tests.simulator.world import World

_MOST_AT_ONCE = 10_000


class Violation(Exception):
    """An invariant does not hold; the message begins with its name."""


class Watch:
    """Sees what the aggregator does and what workers are told."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._counted: dict[UpdateId, int] = {}
        self._refused: set[UpdateId] = set()
        self._end_by: float | None = None
        self._granted: dict[int, float] = {}
        # A round that ends writes four times, and each write takes its time.
        self._grace_s = 1.0 + 20 * world.faults.write_s
        self._acknowledged: set[str] = set()
        self._merged: set[str] = set()
        self._offered_at: dict[str, int] = {}
        self._committed: dict[int, Version] = {}
        self._looked_at = 0.0
        self._at_once = 0
        self._noise: dict[int, tuple[str, ...]] = {}
        self.updates = 0
        self.stale_updates = 0
        self.abandoned = 0

    def stepped(self, before: Round, event: Event, after: Round, effects: tuple[Effect, ...]) -> None:
        """The aggregator has applied an event."""
        world = self._world
        world.trace("aggregator", "step", event, after.phase.name, effects)
        if after.deadline_at is not None and before.deadline_at is None:
            self._end_by = world.loop.now + world.policy.deadline_s + self._grace_s
        if after.phase.final and not before.phase.final:
            self._end_by = None
            self.abandoned += after.phase is RoundPhase.ABANDONED
        for effect in effects:
            if isinstance(effect, Select):
                self._bound(after, effect)
            elif isinstance(effect, Offer):
                self._offered_at[effect.token] = self._versions

    def _bound(self, round_: Round, select: Select) -> None:
        """No worker is asked for that is not missing."""
        policy, most = self._world.policy, round_.aim
        if round_.phase is RoundPhase.SELECTING:
            most = policy.ask(policy.aim(len(self._world.workers)))
        buffered = policy.buffer_size is not None
        phases = [task.phase for task in round_.tasks.values() if buffered or not task.staleness]
        wanted = sum(phase.open for phase in phases) + select.count
        if buffered:
            most = policy.aim(len(self._world.workers))
        else:
            wanted += phases.count(TaskPhase.ACCEPTED)
        if wanted > most:
            raise Violation(f"bound held: {wanted} tasks where {most} are enough")

    def restored(self, round_: Round) -> None:
        """A new incarnation has found a round in progress; its wall clock may have been set in between."""
        world = self._world
        assert world.aggregator.disk.open is not None
        left_s = world.aggregator.disk.open.deadline_at - world.wall_now
        own_s = min(max(left_s, 0.0), world.policy.deadline_s)
        spent_s = self._granted.get(round_.number, 0.0)
        most_s = max(world.policy.reconnect_grace_s, world.policy.deadline_s)
        more_s = max(0.0, min(world.policy.reconnect_grace_s - own_s, most_s - spent_s))
        self._granted[round_.number] = spent_s + more_s
        self._end_by = world.loop.now + own_s + more_s + self._grace_s
        for token in round_.tasks:
            self._offered_at.setdefault(token, self._versions)

    def crashed(self) -> None:
        """The aggregator is down: its clock does not run."""
        self._end_by = None

    def written(self, version: Version, step: int) -> None:
        """A version is about to be written with the noise of this step, whether it will count or not."""
        entries = [entry for entry in self._world.aggregator.disk.releases if entry.step == step]
        if len(entries) != 1:
            raise Violation(
                f"ledger: {len(entries)} entries of step {step} as version {version.version} is written"
            )
        releases = self._world.aggregator.disk.releases
        for before, after in pairwise(releases[max(0, step - 2) : step]):
            told = before.rules.clip_norm if before.round == after.round else before.next_clip_norm
            if after.rules.clip_norm != told:
                raise Violation(f"ledger: step {after.step} clips to {after.rules.clip_norm}, and not to {told}")
        if self._noise.setdefault(step, version.tokens) != version.tokens:
            raise Violation(f"ledger: two sums got the noise of step {step}")

    def _entered_once(self, version: Version) -> None:
        digest, releases = digest_of(version.tokens), self._world.aggregator.disk.releases
        entries = [each for each in releases if (each.version, each.updates) == (version.version, digest)]
        if len(entries) != 1 or self._noise.get(entries[0].step) != version.tokens:
            raise Violation(f"ledger: {len(entries)} entries of version {version.version}")

    def committed(self, version: Version, round_: Round) -> None:
        """A new version is durable."""
        world = self._world
        world.trace("aggregator", "durable", version)
        if world.private:
            self._entered_once(version)
        for update in version.updates:
            if update in self._counted:
                raise Violation(
                    f"counted once: {update} is in versions {self._counted[update]}, {version.version}"
                )
            self._counted[update] = version.version
        begun = [
            (u.worker, self._offered_at[token]) for u, token in zip(version.updates, version.tokens, strict=True)
        ]
        if len(set(begun)) < len(begun):
            raise Violation(f"counted once: a worker has done one task twice in version {version.version}")
        fresh = [token for token in version.tokens if self._counts(token)]
        if len(fresh) < world.policy.quorum or not set(version.tokens) <= set(round_.tasks):
            raise Violation(f"quorum: {len(fresh)} of {world.policy.quorum} in version {version.version}")
        self._bounded_staleness(version)
        if refused := self._refused & set(version.updates):
            raise Violation(f"none refused: {refused} in version {version.version}")
        if version.version != len(self._committed) + 2:
            raise Violation(f"versions grow: version {version.version} after {len(self._committed) + 1}")
        for token in self._acknowledged - self._merged:
            if self._round_of(token) in (None, version.round) and token not in version.tokens:
                raise Violation(f"nothing lost: {token} acknowledged, not in version {version.version}")
        self._merged.update(version.tokens)
        self._committed[version.round] = version
        self.updates += len(version.updates)

    def refused(self, update: UpdateId) -> None:
        """A worker has sent what must not be merged."""
        self._refused.add(update)

    def acknowledged(self, token: str) -> None:
        """A worker is about to be told that its update counts."""
        self._world.trace("aggregator", "acknowledges", token)
        self._acknowledged.add(token)
        version = self._committed.get(self._round_of(token) or 0)
        if version is not None and token not in version.tokens:
            raise Violation(f"nothing lost: {token} acknowledged, not in version {version.version}")

    def _round_of(self, token: str) -> int | None:
        """The round whose model the update is to be in; None: the aggregator knows nothing of it."""
        aggregator = self._world.aggregator
        if aggregator.round is not None and token in aggregator.round.carried:
            return aggregator.round.number + 1
        row = aggregator.disk.rows.get(token)
        return None if row is None else row.round

    def _counts(self, token: str) -> bool:
        return self._world.policy.buffer_size is not None or self._offered_at[token] == self._versions

    def _bounded_staleness(self, version: Version) -> None:
        for token in version.tokens:
            behind = self._versions - self._offered_at[token]
            self.stale_updates += behind > 0
            if behind > self._world.policy.max_staleness:
                raise Violation(f"bound held: an update {behind} versions behind in version {version.version}")

    @property
    def _versions(self) -> int:
        return len(self._committed)

    def told(self, assignment: Assignment) -> None:
        """A worker has been given a task."""
        self._world.trace("worker", "told", assignment)
        latest = self._world.aggregator.disk.version
        if assignment.version > latest:
            raise Violation(
                f"versions grow: version {assignment.version} was told, {latest} is the last durable one"
            )

    def look(self) -> None:
        """After every event of the world."""
        world = self._world
        self._at_once = self._at_once + 1 if world.loop.now == self._looked_at else 0
        self._looked_at = world.loop.now
        if self._at_once > _MOST_AT_ONCE:
            raise Violation("ends on time: time stands still")
        if self._end_by is not None and world.loop.now > self._end_by:
            raise Violation(f"ends on time: the round is open {self._grace_s:.3g} s after its deadline")
        files_each = 2 if world.policy.late == "carry" else 1
        if len(world.aggregator.disk.uploads) > files_each * len(world.workers):
            raise Violation(f"bound held: {len(world.aggregator.disk.uploads)} update files")

    def at_end(self) -> None:
        """The faults have stopped long ago."""
        if not self.went_on():
            stuck = self._world.aggregator.round
            raise Violation(f"goes on: no round has committed since the faults stopped; at the end: {stuck}")

    def went_on(self) -> bool:
        """Whether a round that was opened after the faults stopped has committed."""
        return len(self._committed) > self._world.committed_when_quiet + 1
