"""The learning task of a command: its settings and its trainer. `fedgrpc init` writes its untrained model.

exit code 0     done; one line names the file and its size
          1     the learning task failed
          2     the task, the file or the model cannot be used
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

import click

from fedgrpc.aggregator.first_model import complaint
from fedgrpc.cli.options import Declare, Setting, SettingsCommand
from fedgrpc.cli.values import NamedValues
from fedgrpc.codec.layout import Layout
from fedgrpc.errors import StorageError, UsageError
from fedgrpc.protocol.tasks import Registration
from fedgrpc.storage.model_file import write_model
from fedgrpc.trainer import TaskSetup, Trainer, Weights
from fedgrpc.words import size
from fedgrpc.worker.guarded_trainer import first_weights
from fedgrpc.worker.task_loader import find_task, load_trainer, takes

ALLOWED_TASKS: Final = ("fedgrpc.tasks.*",)
_model = Declare("The model")


def option_setting(declare: Declare) -> Setting:
    """Declare `--option`, under the heading of `declare`."""
    return declare(
        "--option",
        "Option of the task; repeat for each.",
        name="options",
        type=NamedValues(),
        multiple=True,
        default=(),
        metavar="NAME=VALUE",
    )


MODEL_SETTINGS: Final[list[Setting]] = [
    _model("--task", "Learning task, package.module or package.module:Class.", metavar="REF", required=True),
    _model("--model", "Model name, where the task knows several.", metavar="NAME"),
    _model(
        "--data", "Folder or file of data, where the task needs it.", type=click.Path(path_type=Path, exists=True)
    ),
    option_setting(_model),
]


def trainer_of(values: Mapping[str, Any]) -> Trainer:
    """Load the learning task that `MODEL_SETTINGS` name."""
    return load_trainer(
        values["task"],
        model=values["model"],
        data=values["data"],
        seed=values.get("seed", 0),
        options=dict(values["options"]),
        threads=values.get("threads"),
    )


def trainer_for(
    setup: TaskSetup, own_task: str | None, registration: Registration, allowed: Iterable[str] = ALLOWED_TASKS
) -> Trainer:
    """Load the learning task: the worker's own, else the aggregator's with the aggregator's model.

    A run beside the one that the aggregator was started with has a task of its own, or takes the worker's. Code
    that the aggregator chose runs only where it is `allowed`, and never from the working folder.
    """
    chosen_here = own_task is not None and (registration.own or registration.learning_task in ("", own_task))
    task = own_task if chosen_here else registration.learning_task
    if not task:
        raise UsageError("neither this worker nor its aggregator has a --task")
    if not chosen_here and not is_allowed(task, allowed):
        raise UsageError(
            f"the aggregator chose the task {task[:200]!r}, which this device does not allow: "
            "start the worker with --allow-task or --task and that name"
        )
    if not registration.own:
        setup = _for_other_run(setup, task, own_task, chosen_here)
    model = setup.model
    if model is None and task == registration.learning_task:
        model = registration.model or None
    return load_trainer(
        task,
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


def _for_other_run(setup: TaskSetup, task: str, own_task: str | None, here: bool) -> TaskSetup:
    """Return what the task of another run takes of the device's setup: model and options are of its own task."""
    found = find_task(task, here)
    own = own_task in (None, task)
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


_INIT_SETTINGS: Final[list[Setting]] = [
    *MODEL_SETTINGS,
    _model("--seed", "Seed of the untrained model.", type=int, default=0),
    _model(
        "--to",
        "Safetensors file to write, for `fedgrpc aggregator --initial-model`.",
        type=click.Path(path_type=Path, dir_okay=False),
        required=True,
        metavar="FILE",
    ),
]


def _init(**values: Any) -> None:
    path: Path = values["to"]
    if path.exists():
        raise UsageError(f"{path} exists: remove it, or choose another name")
    trainer = trainer_of(values)
    weights, layout = first_weights(trainer)
    if wrong := complaint(layout):
        raise UsageError(f"the model of {values['task']} cannot be used: {wrong}")
    _write(path, layout, weights, {"task": values["task"], "model": values["model"] or ""})
    size_bytes = sum(spec.nbytes for spec in layout)
    click.echo(f"{path}: {len(layout)} tensors, {size(size_bytes)}")


def _write(path: Path, layout: Layout, weights: Weights, about: Mapping[str, str]) -> None:
    try:
        write_model(path, layout, (weights[spec.name] for spec in layout), about)
    except StorageError as error:
        raise UsageError(str(error)) from error


INIT = SettingsCommand("init", _init, _INIT_SETTINGS, "Write the untrained model of a learning task to a file.")
