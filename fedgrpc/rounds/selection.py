"""Selection of workers, uniform or by usefulness and speed (Oort, arXiv 2010.06081), and learned deadlines.

Every choice comes with its reason, and no worker is left out for good.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedgrpc.errors import UsageError
from fedgrpc.rounds.events import Deadline
from fedgrpc.rounds.history import Histories, WorkerHistory, expected_s, quantile, usual_parts
from fedgrpc.rounds.round import Round, RoundPhase
from fedgrpc.rounds.selector import OORT, UNIFORM, Selector, chosen_by, selector_of


@dataclass(frozen=True)
class Choice:
    """A chosen worker, and why it was chosen."""

    worker: str
    reason: str


@dataclass(frozen=True)
class OortRule:
    """Oort's settings, with its defaults, and a floor under fairness.

    `fairness` is the share of seats for the workers that have waited longest. Of the other seats, workers never
    tried get a share that falls from `exploration` by `exploration_decay` a round to `exploration_floor`.
    `slow_penalty` is alpha. `preferred_share` of the known workers meet the preferred pace. (The paper's pacer,
    which relaxes that share when training stalls, is left out.)
    """

    fairness: float = 0.1
    exploration: float = 0.9
    exploration_decay: float = 0.98
    exploration_floor: float = 0.2
    slow_penalty: float = 2.0
    cutoff: float = 0.95
    clip: float = 0.95
    preferred_share: float = 0.5

    def __post_init__(self) -> None:
        for name in ("fairness", "exploration", "exploration_decay", "exploration_floor", "cutoff", "clip"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} must be from 0 to 1, not {getattr(self, name):g}")
        if not 0 < self.preferred_share <= 1:
            raise UsageError(f"preferred_share must be above 0 and at most 1, not {self.preferred_share:g}")
        if not self.slow_penalty >= 0:
            raise UsageError(f"slow_penalty must not be negative, not {self.slow_penalty:g}")

    def explored_share(self, round_number: int) -> float:
        """Return the share of the seats that goes to workers never tried."""
        decayed = self.exploration * self.exploration_decay ** max(0, round_number - 1)
        return max(self.exploration_floor, decayed)


_NEW = WorkerHistory()
_SHARE = 0.9


def choose_uniform(idle: tuple[str, ...], count: int, rng: np.random.Generator) -> tuple[Choice, ...]:
    """Return up to `count` of `idle`, each subset of that size equally likely, whatever the order of `idle`."""
    pool = sorted(idle)
    drawn = rng.choice(len(pool), size=min(count, len(pool)), replace=False) if pool else ()
    return tuple(Choice(pool[index], f"one of {len(pool)} by lot") for index in sorted(drawn))


def choose_poisson(idle: tuple[str, ...], rate: float, rng: np.random.Generator) -> tuple[Choice, ...]:
    """Return those of `idle` whose coin says so, each with the chance `rate`, whatever becomes of the others."""
    pool = sorted(idle)
    coins = rng.random(len(pool)) < rate
    return tuple(Choice(worker, "by its coin") for worker, chosen in zip(pool, coins, strict=True) if chosen)


def choose_oort(
    idle: tuple[str, ...],
    count: int,
    histories: Histories,
    round_number: int,
    rng: np.random.Generator,
    rule: OortRule | None = None,
) -> tuple[Choice, ...]:
    """Return up to `count` of `idle`: workers that waited longest, useful and fast ones, and untried ones."""
    rule = rule or OortRule()
    pool = {worker: histories.get(worker, _NEW) for worker in sorted(idle)}
    count = min(count, len(pool))
    waited = _longest_waiting(pool, math.ceil(rule.fairness * count - 1e-9), round_number)
    rest = {worker: history for worker, history in pool.items() if worker not in {c.worker for c in waited}}
    untried = [worker for worker, history in rest.items() if history.loss is None]
    tried = {worker: history for worker, history in rest.items() if history.loss is not None}
    seats = count - len(waited)
    # Seats that tried workers cannot fill go to untried ones, whatever share those are to have.
    explored = min(len(untried), max(seats - len(tried), round(seats * rule.explored_share(round_number))))
    new = [untried[i] for i in rng.choice(len(untried), size=explored, replace=False)] if explored else []
    useful = _most_useful(tried, seats - explored, round_number, rng, rule)
    return (*waited, *useful, *(Choice(worker, "never tried") for worker in sorted(new)))


def _longest_waiting(pool: Histories, seats: int, round_number: int) -> tuple[Choice, ...]:
    """Return the workers that were chosen longest ago, or never: the floor under fairness."""
    waiting = sorted(pool, key=lambda worker: (pool[worker].selected_in, worker))[:seats]
    return tuple(
        Choice(worker, f"has waited for {round_number - pool[worker].selected_in} rounds") for worker in waiting
    )


def _most_useful(
    tried: Histories, seats: int, round_number: int, rng: np.random.Generator, rule: OortRule
) -> tuple[Choice, ...]:
    """Draw workers in proportion to their utility, among those at or near the top."""
    if seats <= 0 or not tried:
        return ()
    utility = utilities(tried, round_number, rule)
    ranked = sorted(utility, key=lambda worker: (-utility[worker], worker))
    # Admit those close to the last seat's utility, so that chance and not the name settles a near tie.
    bar = rule.cutoff * utility[ranked[min(seats, len(ranked)) - 1]]
    admitted = [worker for worker in ranked if utility[worker] >= bar]
    # A floor, since a draw without replacement needs as many positive shares as seats.
    shares = np.array([max(utility[worker], 1e-12) for worker in admitted])
    drawn = rng.choice(len(admitted), size=min(seats, len(admitted)), replace=False, p=shares / shares.sum())
    chosen = sorted(admitted[i] for i in drawn)
    return tuple(Choice(worker, _describe(utility[worker], tried[worker])) for worker in chosen)


def utilities(tried: Histories, round_number: int, rule: OortRule) -> dict[str, float]:
    """Return the expected worth of each worker's next update (arXiv 2010.06081).

        utility = (min(n |loss|, clip) + bonus) * (T / t)^alpha    the last factor only where t > T

    `n` examples have the mean loss that the worker reported (the paper has the root mean square). In round R a
    worker last tried in round r gets the bonus sqrt(0.1 ln R / r), as a share of the highest worth. Its task takes
    t, and T is the preferred pace.
    """
    paces = {worker: expected_s(history, _SHARE, (0.0, 0.0, 0.0)) or 0.0 for worker, history in tried.items()}
    preferred_s = quantile(paces.values(), rule.preferred_share)
    statistical = {worker: h.example_count * abs(h.loss or 0.0) for worker, h in tried.items()}
    # Clipping bounds what a worker gains by reporting a huge loss or number of examples.
    highest = quantile(statistical.values(), rule.clip)
    utility = {}
    for worker, history in tried.items():
        # The bonus grows with the time since the worker was last tried, so that old losses are measured again.
        age = max(1, history.selected_in)
        worth = min(statistical[worker], highest)
        worth += math.sqrt(0.1 * math.log(max(1, round_number)) / age) * (highest or 1.0)
        if paces[worker] > preferred_s:
            worth *= (preferred_s / paces[worker]) ** rule.slow_penalty
        utility[worker] = worth
    return utility


def _describe(utility: float, history: WorkerHistory) -> str:
    seconds = expected_s(history, _SHARE, (0.0, 0.0, 0.0)) or 0.0
    return f"utility {utility:.3g}: loss {history.loss:.3g} on {history.example_count} examples, {seconds:.3g} s"


def choose_by(
    selector: Selector,
    name: str,
    idle: tuple[str, ...],
    count: int,
    histories: Histories,
    round_number: int,
    rng: np.random.Generator,
) -> tuple[Choice, ...]:
    """Return the choice of a selector, or of the lot where that cannot be taken."""
    workers, wrong = chosen_by(selector, idle, count, histories, round_number, rng)
    if wrong:
        return tuple(
            Choice(each.worker, f"{each.reason}, since selection {name} failed: {wrong}")
            for each in choose_uniform(idle, count, rng)
        )
    return tuple(Choice(worker, f"by {name}") for worker in workers)


@dataclass(frozen=True)
class SelectionPolicy:
    """Rules by which workers and the deadline are chosen, from the workers' history; `RoundPolicy` has no history.

    `selection`: uniform, by expected usefulness and speed (Oort, arXiv 2010.06081), or by a `Selector`. With
    Oort, `fairness` is the share of the seats for workers that have waited longest, and `exploration` the share
    of the others that goes to workers never tried, in the first round. `learn_deadline`: take the deadline that
    the wanted updates are expected to meet, by the `deadline_quantile` of each worker's own times, times
    `deadline_margin`.
    """

    selection: str = UNIFORM
    fairness: float = 0.1
    exploration: float = 0.9
    learn_deadline: bool = False
    deadline_quantile: float = 0.9
    deadline_margin: float = 1.2

    def __post_init__(self) -> None:
        selector_of(self.selection)
        if not 0 < self.deadline_quantile <= 1:
            raise UsageError(f"deadline_quantile must be above 0 and at most 1, not {self.deadline_quantile:g}")
        if not 1 <= self.deadline_margin < math.inf:
            raise UsageError(f"deadline_margin must be a number from 1, not {self.deadline_margin:g}")
        self._oort()

    def _oort(self) -> OortRule:
        floor = min(OortRule.exploration_floor, self.exploration)
        return OortRule(fairness=self.fairness, exploration=self.exploration, exploration_floor=floor)

    def choose(
        self, round_: Round, idle: tuple[str, ...], count: int, histories: Histories, rng: np.random.Generator
    ) -> tuple[tuple[Choice, ...], Deadline | None]:
        """Return up to `count` of `idle`, each with its reason, and the deadline if these open the round.

        None: the policy's deadline. A buffer has that too, since it does not wait for its slowest worker.
        """
        if round_.policy.poisson_rate is not None:
            choices = choose_poisson(idle, round_.policy.poisson_rate, rng)
        elif (selector := selector_of(self.selection)) is not None:
            choices = choose_by(selector, self.selection, idle, count, histories, round_.number, rng)
        elif self.selection == OORT:
            choices = choose_oort(idle, count, histories, round_.number, rng, self._oort())
        else:
            choices = choose_uniform(idle, count, rng)
        opens = round_.phase is RoundPhase.SELECTING and round_.policy.buffer_size is None
        if not (self.learn_deadline and opens):
            return choices, None
        workers = [choice.worker for choice in choices]
        rule = DeadlineRule(self.deadline_quantile, self.deadline_margin)
        return choices, learned_deadline(workers, round_.aim, histories, rule)


@dataclass(frozen=True)
class DeadlineRule:
    """Certainty about each worker (`quantile` of its own times), and a factor for what those do not show."""

    quantile: float = 0.9
    margin: float = 1.2


_UNKNOWN = WorkerHistory()


def learned_deadline(
    workers: Sequence[str], aim: int, histories: Histories, rule: DeadlineRule | None = None
) -> Deadline | None:
    """Return the deadline for a round of `workers` that wants `aim` updates, without the policy's bounds.

    A worker never timed counts as a median one. None while no times are known at all.
    """
    rule = rule or DeadlineRule()
    usual = usual_parts(histories.values(), rule.quantile)
    expected = [
        (seconds, worker)
        for worker in workers
        if (seconds := expected_s(histories.get(worker, _UNKNOWN), rule.quantile, usual)) is not None
    ]
    if not expected:
        return None
    # The aim is reached with the fastest `count` workers, so the deadline is that of the slowest among them.
    expected.sort()
    count = min(aim, len(expected))
    seconds, slowest = expected[count - 1]
    reason = f"{count} of {len(workers)} are expected within {seconds:.3g} s, {slowest} as the last"
    return Deadline(seconds * rule.margin, reason)
