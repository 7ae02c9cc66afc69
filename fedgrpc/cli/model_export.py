"""`fedgrpc model export --onnx`: a version as a program that runs without fedgrpc and without PyTorch.

exit code 0     done; one line names the file and what it takes
          1     no such run or version; no aggregator answers; the learning task failed
          2     the task has no model in PyTorch, or the exporter is not installed
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import click

from fedgrpc.claims import printable
from fedgrpc.cli.learning_task import option_setting
from fedgrpc.cli.model_versions import VersionSource, fetched
from fedgrpc.cli.models import argument, model_command, named
from fedgrpc.cli.options import Declare
from fedgrpc.errors import ExtraMissing, UsageError
from fedgrpc.runs.keeping import Reference
from fedgrpc.storage.stored_run import metadata
from fedgrpc.trainer import TaskSetup

_what = Declare("What")
_task = Declare("The learning task")


async def _export(source: VersionSource, values: dict[str, Any]) -> None:
    # Imported late: it needs PyTorch, which no other command of an operator does.
    try:
        from fedgrpc.torch.onnx_export import export_onnx
    except ModuleNotFoundError as error:
        raise ExtraMissing.of("export", "torch,onnx", error) from error

    found = await source.version(Reference.parse(values["version"]))
    task = values["task"] or found.learning_task
    if not task:
        raise UsageError("the run does not say which learning task its model is of: give --task")
    setup = TaskSetup(values["model"], values["data"], options=dict(values["options"]))
    path: Path = values["onnx"]
    with fetched() as folder:
        weights = folder / "model.safetensors"
        await source.fetch(found, weights)
        about = await asyncio.to_thread(export_onnx, weights, path, task, setup, metadata(found))
    click.echo(printable(f"{path}: {named(found)}, {about}"))


MODEL_EXPORT = model_command(
    "model export",
    _export,
    "Write a VERSION as an ONNX program (extra: onnx).",
    _what(
        "--onnx",
        "ONNX file to write; one that is there is replaced.",
        type=click.Path(path_type=Path, dir_okay=False),
        required=True,
        metavar="FILE",
    ),
    _task("--task", "Learning task of the model; without: the run's.", type=str, default=None, metavar="REF"),
    _task("--model", "Model name, where the task knows several.", type=str, default=None, metavar="NAME"),
    _task(
        "--data",
        "Data of the task, from which it knows what an input looks like.",
        type=click.Path(path_type=Path, exists=True),
        default=None,
    ),
    option_setting(_task),
    arguments=[argument("version")],
)
