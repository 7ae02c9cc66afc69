"""Terms of a task, found by its token: the model that its worker pulls, and the answer to its poll.

The rule: what was agreed on with a worker holds for as long as it has the task, whatever it or the settings say
meanwhile. Only those of an evaluation, which has no record, are agreed on again.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

from fedgrpc.aggregator.coordinator import Coordinator
from fedgrpc.aggregator.histories import upload_reserve_s
from fedgrpc.aggregator.negotiation import link_of
from fedgrpc.protocol.tasks import Task, task_to_proto
from fedgrpc.rounds.policy import TaskKind
from fedgrpc.runs.task_context import TaskContext
from fedgrpc.training_plan import TrainingPlan
from fedgrpc.v1 import aggregator_pb2


class TaskTerms:
    """The terms of one run's tasks. Changes nothing."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._run = coordinator.machine
        self._fleet = coordinator.fleet
        self._workers = coordinator.workers

    def given(self, worker: str, token: str) -> tuple[int, TaskContext]:
        """Return the version that the worker of a task starts from, and what else it was given.

        Raises `UnknownTask`, `WrongIdentity`, and `RoundClosed` once the task has ended.
        """
        if evaluation := self._run.evaluations.find(worker, token):
            return evaluation.version, self._agreed(worker, TaskContext())
        round_ = self._run.current
        round_.check_task(worker, token)
        return round_.version_of(token), self._agreed(worker, round_.context(token))

    def _agreed(self, worker: str, context: TaskContext) -> TaskContext:
        if context.agreed is not None:
            return context
        agreed = self._coordinator.negotiation.agreed(self._fleet.get(worker), self._workers.history(worker))
        return replace(context, agreed=agreed)

    def message(self, worker: str, token: str) -> aggregator_pb2.Task:
        """Return the terms for the worker of an open task. Raises as `given`."""
        coordinator, instructions = self._coordinator, self._coordinator.instructions
        version, context = self.given(worker, token)
        assert context.agreed is not None
        evaluation, round_ = self._run.evaluations.find(worker, token), self._run.round
        task = Task(
            token=token,
            run=coordinator.settings.run_name,
            round=0 if round_ is None else round_.number,
            kind=TaskKind.EVALUATE,
            model_version=version,
            plan=self._plan(worker),
            upload_recipe=context.agreed.upload.full_text,
            run_id=self._run.id,
            uplink_bytes_per_second=link_of(self._fleet.get(worker), self._workers.history(worker)).up or 0.0,
            evaluate=instructions.evaluate,
            local_model=context.local.plan,
            sub_model=context.local.sub_model,
        )
        if evaluation is None:
            assert round_ is not None
            task = replace(
                task,
                kind=round_.kind,
                seed=_seed(instructions.seed, round_.number, worker),
                deadline_s=round_.state.deadline_at,
            )
        message = task_to_proto(task, coordinator.clock())
        if self._fleet.get(worker).leads:
            models = coordinator.local_models
            message.leaf.CopyFrom(instructions.for_leaf(models.to_proto(), models.channels))
        return message

    def _plan(self, worker: str) -> TrainingPlan:
        plan = self._coordinator.instructions.plan
        if plan.upload_reserve_s is None:
            return plan
        reserve_s = upload_reserve_s(self._workers.history(worker), plan.upload_reserve_s)
        return replace(plan, upload_reserve_s=reserve_s)


def _seed(seed: int, number: int, worker: str) -> int:
    """Return 32 bits: many generators, such as scikit-learn's, take no larger seed."""
    text = f"{seed}/{number}/{worker}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "little")
