"""Terms of the tasks of a run: what its operator or its parent asks of workers, and what each is given.

The rule: what was agreed on with a worker holds for as long as it has the task, whatever it or the settings say
meanwhile. Only those of an evaluation, which has no record, are agreed on again. A leaf asks its workers for what
its parent would ask them for: the same plan, seeds and weights, and the same local models by device class.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TypeVar

from fedgrpc import claims
from fedgrpc.aggregator.histories import RunWorkers, upload_reserve_s
from fedgrpc.aggregator.local_models import LocalModels
from fedgrpc.aggregator.negotiation import Negotiation, link_of
from fedgrpc.aggregator.registry import WorkerRegistry
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.protocol.plans import training_plan_from_proto
from fedgrpc.protocol.secure import common_terms_from_bytes, secure_groups_to_proto, secure_task_to_proto
from fedgrpc.protocol.tasks import Task, task_to_proto
from fedgrpc.rounds.fields import with_fields
from fedgrpc.rounds.policy import TaskKind
from fedgrpc.runs.machine import RunMachine
from fedgrpc.runs.secure_sum import SecureSum
from fedgrpc.runs.task_context import TaskContext
from fedgrpc.training_plan import TrainingPlan
from fedgrpc.v1 import aggregator_pb2, round_pb2, tensor_pb2

T = TypeVar("T", int, float)


@dataclass(frozen=True)
class TrainingInstructions:
    """Fields of `AggregatorSettings` that a parent decides for its leaves."""

    plan: TrainingPlan
    evaluate: bool
    seed: int
    worker_weights: Mapping[str, float]
    rounds: int | None
    max_examples: int | None
    clip_norm: float | None
    noise_weights: bool

    @classmethod
    def from_settings(cls, settings: AggregatorSettings) -> TrainingInstructions:
        """Return the instructions of the operator."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})

    @classmethod
    def from_parent(cls, task: aggregator_pb2.Task, settings: AggregatorSettings) -> TrainingInstructions:
        """Return those of a leaf's task. Weights that the leaf's own operator gives to workers come first.

        Raises `LayoutError` for a plan, weights or a clip norm out of their ranges.
        """
        leaf = task.leaf
        clip_norm = claims.CLIP_NORM.checked(leaf.clip_norm) if leaf.clip_norm else None
        weights = {worker: claims.WEIGHT.checked(weight) for worker, weight in leaf.worker_weights.items()}
        return cls(
            training_plan_from_proto(task.plan),
            task.evaluate,
            leaf.seed,
            {**weights, **settings.worker_weights},
            leaf.total_rounds or None,
            _lower(leaf.max_examples, settings.max_examples),
            _lower(clip_norm, settings.clip_norm),
            not leaf.plain_weights,
        )

    def for_leaf(
        self, local_models: round_pb2.LocalModels | None, channels: tensor_pb2.ChannelMap | None
    ) -> round_pb2.LeafInstructions:
        """Return what a leaf needs besides its task."""
        return round_pb2.LeafInstructions(
            seed=self.seed,
            worker_weights=self.worker_weights,
            local_models=local_models,
            channels=channels,
            total_rounds=self.rounds or 0,
            max_examples=self.max_examples or 0,
            clip_norm=self.clip_norm or 0.0,
            plain_weights=not self.noise_weights,
        )


class TaskTerms:
    """The terms of one run's tasks, by the `instructions` of its operator or its parent."""

    def __init__(
        self,
        settings: AggregatorSettings,
        run: RunMachine,
        fleet: WorkerRegistry,
        workers: RunWorkers,
        negotiation: Negotiation,
        local_models: LocalModels,
        clock: Callable[[], float],
    ) -> None:
        self.instructions = TrainingInstructions.from_settings(settings)
        self._run_name = settings.run_name
        self._privacy = settings.privacy
        self._masked = settings.sums_here
        # What leaves are told of their workers' updates.
        self._groups = settings.secure if settings.sums_at_leaves else None
        self._run = run
        self._fleet = fleet
        self._workers = workers
        self._negotiation = negotiation
        self._local_models = local_models
        self._clock = clock

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
        agreed = self._negotiation.agreed(self._fleet.get(worker), self._workers.history(worker))
        return with_fields(context, agreed=agreed)

    def message(self, worker: str, token: str) -> aggregator_pb2.Task:
        """Return the terms for the worker of an open task. Raises as `given`."""
        instructions = self.instructions
        version, context = self.given(worker, token)
        assert context.agreed is not None
        evaluation, round_ = self._run.evaluations.find(worker, token), self._run.round
        task = Task(
            token=token,
            run=self._run_name,
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
            clip_norm=self._run.clip_norm or (instructions.clip_norm if self._masked else None),
            metrics=self._privacy.metrics,
        )
        if evaluation is None:
            assert round_ is not None
            task = with_fields(
                task,
                kind=round_.kind,
                seed=_seed(instructions.seed, round_.number, worker),
                deadline_s=round_.state.deadline_at,
            )
        message = task_to_proto(task, self._clock())
        if evaluation is None and round_ is not None and round_.secure is not None:
            _put_into_sum(message, round_.secure, worker)
        if self._fleet.get(worker).leads:
            models = self._local_models
            message.leaf.CopyFrom(instructions.for_leaf(models.to_proto(), models.channels))
            if self._groups is not None:
                message.leaf.secure.CopyFrom(secure_groups_to_proto(self._groups))
        return message

    def _plan(self, worker: str) -> TrainingPlan:
        plan = self.instructions.plan
        if plan.upload_reserve_s is None:
            return plan
        reserve_s = upload_reserve_s(self._workers.history(worker), plan.upload_reserve_s)
        return replace(plan, upload_reserve_s=reserve_s)


def _put_into_sum(message: aggregator_pb2.Task, sum_: SecureSum, worker: str) -> None:
    """Make it the task of a device of the sum: what all are told alike is as when the sum was opened."""
    common = common_terms_from_bytes(sum_.common)
    message.plan.CopyFrom(common.plan)
    message.privacy.CopyFrom(common.privacy)
    message.evaluate = common.evaluate
    message.secure.CopyFrom(secure_task_to_proto(sum_, worker))


def _seed(seed: int, number: int, worker: str) -> int:
    """Return 32 bits: many generators, such as scikit-learn's, take no larger seed."""
    text = f"{seed}/{number}/{worker}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "little")


def _lower(parents: T | None, own: T | None) -> T | None:
    """The lower of two limits; 0 and None are none."""
    return min(filter(None, (parents, own)), default=None)
