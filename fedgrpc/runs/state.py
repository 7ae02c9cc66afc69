"""Knowledge of one run, and the questions that it answers. Pure.

The rule: nothing here changes anything. `fedgrpc.runs.machine` has the events that do.
"""

from __future__ import annotations

from fedgrpc.codec.layout import Layout
from fedgrpc.errors import RoundClosed
from fedgrpc.privacy.ledger import Ledger
from fedgrpc.privacy.one_time_keys import PublicKeys
from fedgrpc.rounds.events import (
    TaskPhase,
    WorkersAvailable,
)
from fedgrpc.rounds.policy import TaskKind
from fedgrpc.rounds.round import Round, Streak, wake_at
from fedgrpc.runs.evaluations import Evaluation, Evaluations
from fedgrpc.runs.events import (
    Ending,
    EndReason,
    EndRun,
    NextStep,
    OpenRound,
    RollBack,
    RunPhase,
    Stay,
)
from fedgrpc.runs.fleet import FleetView
from fedgrpc.runs.round_in_progress import RoundInProgress
from fedgrpc.runs.rules import RunRules
from fedgrpc.runs.versions import Versions


class RunState:
    """State of one run. Read its attributes as you like; `RunMachine.apply` alone changes them.

    `version` 0: no model yet; `trained` rounds have been committed to the model. `leases`: the token of each
    worker that holds a task. `held`: the version that each worker said to hold. `new_examples`: how many each said
    to have. `told`: workers that know of the end. `ledger`: of a run that releases its versions with noise.
    `keys`: one-time keys of workers, for the next secure sum.
    """

    def __init__(self, rules: RunRules, run_id: str, started_at: float) -> None:
        """Start a run without a model."""
        self.rules = rules
        self.id = run_id
        self.makes_versions = True
        self.started_at = started_at
        self.phase = RunPhase.RUNNING
        self.ending = Ending()
        self.paused_reason = ""
        self.version = 0
        self.layout: Layout = ()
        self.trained = 0
        self.versions = Versions(rules.measures, rules.evaluators_named)
        self.rolling_back: RollBack | None = None
        self.round: RoundInProgress | None = None
        self.last_number = 0
        self.leases: dict[str, str] = {}
        self.held: dict[str, tuple[int, bytes]] = {}
        self.new_examples: dict[str, int] = {}
        self.keys: dict[str, PublicKeys] = {}
        self.told: set[str] = set()
        self.evaluations = Evaluations()
        self.streak = Streak()
        self.closing_evaluation = rules.evaluate
        self.ledger: Ledger | None = None

    @property
    def began(self) -> bool:
        """True if there is a model."""
        return bool(self.layout)

    @property
    def ended(self) -> bool:
        return self.phase.final

    @property
    def going_on(self) -> bool:
        """True if another round may follow the one in progress."""
        return not self.ended and self.ending.reason is EndReason.NONE and self.rolling_back is None

    @property
    def current(self) -> RoundInProgress:
        """The round in progress. Raises `RoundClosed` when there is none."""
        if self.round is None:
            raise RoundClosed("no round is in progress")
        return self.round

    def wants(self, token: str) -> bool:
        """Return whether there is a use for events of this task."""
        return self.round is not None and self.round.wants(token)

    def takes_update(self, token: str) -> bool:
        """Return whether this task may still deliver its update."""
        return self.round is not None and self.round.takes_update(token)

    def task_of(self, worker: str) -> str | None:
        """Return the token of the task that a worker may work on now."""
        token = self.leases.get(worker)
        return token if token is not None and self.wants(token) else None

    def round_of(self, token: str) -> RoundInProgress:
        """Return the round in progress, of which this task is. Raises `RoundClosed` when it is not."""
        if self.round is None or token not in self.round.state.tasks:
            raise RoundClosed("the round of this task has ended")
        return self.round

    def question_for(self, worker: str) -> str | None:
        """Return the token of the worker's task in a secure sum that waits for its proofs or its answers."""
        if self.round is None or self.round.secure is None or not self.round.secure.asks(worker):
            return None
        tasks = self.round.state.tasks.items()
        return next((token for token, task in tasks if task.worker == worker), None)

    @property
    def wake_at(self) -> float | None:
        """Time of the next `Tick` for the round in progress, if nothing else happens; None: no tick is due."""
        due, secure = wake_at(self.current.state), self.current.secure
        if secure is None or secure.due_at is None or self.current.state.phase.final:
            return due
        return secure.due_at if due is None else min(due, secure.due_at)

    def workers_available(self, fleet: FleetView, now: float) -> WorkersAvailable:
        """Count the workers that could take a task of the round in progress."""
        left_out = self._left_out(fleet, now)
        return WorkersAvailable(self._idle_but(left_out, fleet), fleet.live_trainers(now, left_out))

    def idle_trainers(self, fleet: FleetView, now: float) -> tuple[str, ...]:
        """Names of the idle trainers that may have a task of the round in progress."""
        return self._idle_but(self._left_out(fleet, now), fleet)

    def _left_out(self, fleet: FleetView, now: float) -> frozenset[str]:
        """Workers without new examples, and those that held up rounds again and again where others are enough."""
        unchanged = self._without_new_examples() | self._resting() | self._without_keys(fleet)
        doubted = fleet.doubted(now)
        if not doubted or fleet.live_trainers(now, doubted | unchanged) < self.rules.policy.needed_idle:
            return unchanged
        return doubted | unchanged

    def _without_new_examples(self) -> frozenset[str]:
        """Workers that tell of too few new examples to take part in a round of training."""
        least = self.rules.min_new_examples
        if not least or self.round is None or self.round.kind is not TaskKind.TRAIN:
            return frozenset()
        return frozenset(worker for worker, count in self.new_examples.items() if count < least)

    @property
    def clip_norm(self) -> float | None:
        """The longest that an update of the round in progress counts; None: versions are released as they are."""
        if self.ledger is None:
            return None
        return self.ledger.rules_of(-1 if self.round is None else self.round.number).clip_norm

    def _resting(self) -> frozenset[str]:
        """Workers that took part in one of the last noisy versions, and so may not in the next."""
        if self.ledger is None or self.round is None or self.round.kind is not TaskKind.TRAIN:
            return frozenset()
        return self.ledger.resting

    def _without_keys(self, fleet: FleetView) -> frozenset[str]:
        """Idle workers that cannot take part in a secure sum."""
        if not self.rules.secure or self.round is None or self.round.kind is not TaskKind.TRAIN:
            return frozenset()
        return frozenset(name for name in fleet.idle_trainers(self.leases) if name not in self.keys)

    def _idle_but(self, left_out: frozenset[str], fleet: FleetView) -> tuple[str, ...]:
        if self.round is not None and self.round.secure is not None:
            # Nobody joins a secure sum that has begun, also in place of another.
            return ()
        idle = fleet.idle_trainers(self.leases)
        if left_out:
            idle = tuple(name for name in idle if name not in left_out)
        if self.round is None or self.round.kind is not TaskKind.INITIALIZE:
            return idle
        return tuple(name for name in idle if self.rules.initialises(name))

    @property
    def next_kind(self) -> TaskKind:
        """Kind of the next round."""
        if not self.began:
            return TaskKind.INITIALIZE
        return TaskKind.EVALUATE if self.rules.enough(self.trained) else TaskKind.TRAIN

    def next_step(self, wall_now: float, now: float) -> NextStep:
        """Decide what to do while no round is in progress."""
        if self.rolling_back is not None:
            return self.rolling_back
        if self.phase is RunPhase.PAUSED:
            return Stay()
        if self.ending.reason is not EndReason.NONE:
            return EndRun(self.ending)
        if self.began and self.rules.enough(self.trained) and not self.closing_evaluation:
            done = Ending(EndReason.ROUNDS_DONE, f"all {self.rules.rounds} rounds are done")
            return EndRun(done, after_evaluators=True)
        kind = self.next_kind
        if kind is TaskKind.TRAIN and self.ledger is not None and not self.ledger.affordable:
            spent = f"a further version would cost more than an epsilon of {self.ledger.target_epsilon:g}"
            return EndRun(Ending(EndReason.PRIVACY_SPENT, spent), after_evaluators=True)
        first = kind is TaskKind.INITIALIZE and not self.version
        state = Round(0 if first else self.last_number + 1, self.rules.policy.for_kind(kind), now)
        return OpenRound(RoundInProgress(state, kind, self.version, wall_now))

    def hopeless(self, ended: RoundInProgress, fleet: FleetView, now: float) -> str:
        """Say why the round after this abandoned one would end in the same way; "": it may not.

        A few bad workers pause no run: others that deliver, and are enough, continue without them.
        """
        others = fleet.live_trainers(now, self.streak.workers)
        # Where nobody is to blame, what is made of the updates fails: a rule of one's own, perhaps.
        blamed = self.streak.delivered and bool(self.streak.workers)
        others_deliver = blamed and others >= self.rules.policy.needed_idle
        if not self.streak.hopeless or others_deliver:
            return ""
        lost = [
            task for task in ended.state.tasks.values() if task.phase is not TaskPhase.ACCEPTED and task.reason
        ]
        first = min(lost, key=lambda task: task.phase not in (TaskPhase.FAILED, TaskPhase.REJECTED), default=None)
        example = f" ({first.worker}: {first.reason})" if first else ""
        return f"{self.streak.count} rounds in a row were abandoned for one reason: {ended.state.reason}{example}"

    def evaluation_of(self, worker: str) -> Evaluation | None:
        """Return the task of an evaluator, None once it has scored the latest version."""
        task = self.evaluations.held_by(worker)
        return task if task is not None and self._is_latest(task) else None

    def _is_latest(self, task: Evaluation) -> bool:
        waiting = self.evaluations.waiting_for(task.worker, self.version)
        return self.began and task.version == self.version and waiting
