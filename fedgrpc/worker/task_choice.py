"""The choice between a worker's own learning task and that of a run.

The rule: code that the aggregator chose runs only where the device allows it, and never from the working folder.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Final

from fedgrpc.errors import UsageError
from fedgrpc.protocol.tasks import Registration
from fedgrpc.trainer import TaskSetup, Trainer
from fedgrpc.worker.task_loader import find_task, load_trainer, reference_of, takes

ALLOWED_TASKS: Final = ("fedgrpc.tasks.*",)


def trainer_for(
    setup: TaskSetup,
    own_task: str | type | None,
    registration: Registration,
    allowed: Iterable[str] = ALLOWED_TASKS,
) -> Trainer:
    """Load the learning task: the worker's own, else the aggregator's with the aggregator's model.

    `own_task` is a class, or its reference. A run beside the one that the aggregator was started with has a task
    of its own, or takes the worker's. Code that the aggregator chose runs only where it is `allowed`, and never
    from the working folder.
    """
    own = reference_of(own_task) if own_task is not None else None
    chosen_here = own is not None and (registration.own or registration.learning_task in ("", own))
    task = own if chosen_here else registration.learning_task
    if not task:
        raise UsageError("neither this worker nor its aggregator has a --task")
    if not chosen_here and not is_allowed(task, allowed):
        raise UsageError(
            f"the aggregator chose the task {task[:200]!r}, which this device does not allow: "
            "start the worker with --allow-task or --task and that name"
        )
    loaded: str | type = own_task if chosen_here and own_task is not None else task
    if not registration.own:
        setup = _for_other_run(setup, loaded, own in (None, task), chosen_here)
    model = setup.model
    if model is None and task == registration.learning_task:
        model = registration.model or None
    return load_trainer(
        loaded,
        model=model,
        data=setup.data,
        device=setup.device,
        partition=setup.partition,
        part=setup.part,
        seed=setup.seed,
        options={**registration.options, **setup.options},
        threads=setup.threads,
        here=chosen_here,
    )


def _for_other_run(setup: TaskSetup, task: str | type, own: bool, here: bool) -> TaskSetup:
    """Return what the task of another run takes of the setup: model and options only for the device's `own`."""
    found = find_task(task, here)
    return replace(
        setup,
        model=setup.model if own else None,
        data=setup.data if takes(found, "data") else None,
        partition=setup.partition if takes(found, "partition") else None,
        part=setup.part if takes(found, "part") else None,
        options=setup.options if own else {},
    )


def is_allowed(task: str, allowed: Iterable[str]) -> bool:
    """Return whether one of the patterns matches the task or its module."""
    module = task.partition(":")[0]
    return any(fnmatchcase(task, pattern) or fnmatchcase(module, pattern) for pattern in allowed)
