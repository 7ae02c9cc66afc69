"""The learning task of a command: its settings and its trainer. `fedgrpc init` writes its untrained model.

exit code 0     done; one line names the file and its size
          1     the learning task failed
          2     the task, the file or the model cannot be used
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import click

from fedgrpc.aggregator.first_model import complaint
from fedgrpc.cli.options import Declare, Setting, SettingsCommand
from fedgrpc.cli.values import NamedValues
from fedgrpc.codec.layout import Layout
from fedgrpc.errors import StorageError, UsageError
from fedgrpc.storage.model_file import write_model
from fedgrpc.trainer import Trainer, Weights
from fedgrpc.words import size
from fedgrpc.worker.guarded_trainer import first_weights
from fedgrpc.worker.task_loader import load_trainer

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
