"""Scores of committed versions by evaluators: workers that train nothing and hold no round."""

from __future__ import annotations

from dataclasses import dataclass

from fedgrpc import claims
from fedgrpc.aggregation.mean import mean_metrics
from fedgrpc.errors import WrongIdentity


@dataclass(frozen=True)
class Evaluation:
    """Task of one evaluator: score this version."""

    token: str
    worker: str
    version: int


class Evaluations:
    """Hands each evaluator the latest version once, and keeps the scores of that version."""

    def __init__(self) -> None:
        self._tasks: dict[str, Evaluation] = {}
        self._scored: dict[str, int] = {}
        self._version = 0
        self._scores: list[tuple[dict[str, float], float]] = []

    def copy(self) -> Evaluations:
        """Return a copy that changes on its own."""
        copied = Evaluations()
        copied._tasks, copied._scored = dict(self._tasks), dict(self._scored)
        copied._version, copied._scores = self._version, list(self._scores)
        return copied

    def offer(self, worker: str, version: int, token: str) -> Evaluation | None:
        """Return the worker's task, None once it has scored `version`; `token` is that of a new one."""
        if version == 0 or self._scored.get(worker, 0) >= version:
            return None
        task = self._tasks.get(worker)
        if task is None or task.version != version:
            task = self._tasks[worker] = Evaluation(token, worker, version)
        return task

    def held_by(self, worker: str) -> Evaluation | None:
        """Return the task that the worker was last given."""
        return self._tasks.get(worker)

    def find(self, worker: str, token: str) -> Evaluation | None:
        """Return the evaluation of that token, if there is one. Raises `WrongIdentity` for another worker's."""
        for task in self._tasks.values():
            if task.token == token:
                if task.worker != worker:
                    raise WrongIdentity("the token belongs to another worker")
                return task
        return None

    def waiting_for(self, worker: str, version: int) -> bool:
        """Return whether the worker still owes scores of `version`."""
        return self._scored.get(worker, 0) < version

    def give_back(self, task: Evaluation) -> None:
        """Note that a worker cannot score this version. It is not asked again before the next."""
        self._scored[task.worker] = max(task.version, self._scored.get(task.worker, 0))

    def score(self, task: Evaluation, metrics: dict[str, float], example_count: int) -> dict[str, float]:
        """Take one evaluator's scores. Return the mean of all scores of that version, by examples."""
        if self.waiting_for(task.worker, task.version):
            if task.version != self._version:
                self._version, self._scores = task.version, []
            self._scores.append((metrics, float(example_count)))
            self._scored[task.worker] = task.version
        return mean_metrics(self._scores)

    def scores_of(self, version: int) -> tuple[int, dict[str, float]] | None:
        """Return the mean scores and the number of examples; None for all but the version last scored."""
        if self._version != version or not self._scores:
            return None
        return claims.EXAMPLES.total(int(count) for _, count in self._scores), mean_metrics(self._scores)
