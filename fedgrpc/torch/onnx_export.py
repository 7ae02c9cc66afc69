"""A model version as an ONNX program (https://onnx.ai), by PyTorch's own exporter.

The program takes what the learning task's `prepare` gives the model: prepare inputs in the same way before.
"""

from __future__ import annotations

import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

import torch
from torch import nn

from fedgrpc.errors import ExtraMissing, LayoutError, TaskError, UsageError
from fedgrpc.storage.files import storage_errors, sync
from fedgrpc.storage.model_file import ModelFile, ModelTensors
from fedgrpc.torch.task import TorchTask
from fedgrpc.torch.trainer import TorchTrainer
from fedgrpc.trainer import TaskSetup
from fedgrpc.worker.guarded_trainer import users_code
from fedgrpc.worker.task_loader import find_task

_NEEDED: Final = ("onnx", "onnxscript")


def export_onnx(
    weights: Path, path: Path, reference: str, setup: TaskSetup, about: Mapping[str, str] = MappingProxyType({})
) -> str:
    """Write the weights of a safetensors file, in the learning task's model, as the ONNX file `path`.

    `about` is text for its metadata. Returns what the program takes and gives, in words. The first dimension of
    both is the batch, of any size.

    Raises:
        UsageError: the task is no `TorchTask`, has no data to know its input from, or the exporter is missing.
        TaskError: the task's code, or the exporter, raised.
        LayoutError: the weights are not of the task's model.
    """
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise ExtraMissing.of(f"export (by {' and '.join(missing)})", "onnx")
    kind = find_task(reference)
    if not (isinstance(kind, type) and issubclass(kind, TorchTask)):
        raise UsageError(f"task {reference} is no TorchTask: only a model in PyTorch can be exported")
    with users_code(reference):
        trainer = kind.build_trainer(setup)
    module, example = _loaded(trainer, weights)
    with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=".onnx-") as folder:
        part = Path(folder) / path.name
        outputs = _export(module, example, part, reference)
        _describe(part, about)
        with storage_errors(path):
            part.replace(path)
            sync(path.absolute().parent)
    return f"input {_shape(example)}, output {_shape(outputs)}"


def _loaded(trainer: TorchTrainer, weights: Path) -> tuple[nn.Module, torch.Tensor]:
    model = ModelFile.open(weights)
    there = {(spec.name, spec.shape) for spec in model.layout}
    if not {(spec.name, spec.shape) for spec in trainer.layout()} <= there:
        raise LayoutError(
            "the version's tensors are not those of the learning task's model; give --task or --model"
        )
    tensors = ModelTensors(model)
    with users_code():
        return trainer.to_export({spec.name: tensors[spec.name] for spec in trainer.layout()})


def _export(module: nn.Module, example: torch.Tensor, path: Path, reference: str) -> torch.Tensor:
    batch = torch.export.Dim("batch")
    # The exporter names each optional package that is not installed.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs = module(example)
        try:
            torch.onnx.export(
                module,
                (example,),
                str(path),
                input_names=["input"],
                output_names=["output"],
                dynamic_shapes=({0: batch},),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        except Exception as error:
            # The exporter raises errors of torch, of onnx and of the model itself.
            first = str(error).strip().splitlines()
            raise TaskError(
                f"the model of {reference} cannot be exported: {first[0] if first else error!r}"
            ) from error
    if not isinstance(outputs, torch.Tensor):
        raise UsageError(f"the model of {reference} gives {type(outputs).__name__}: only a tensor can be exported")
    return outputs


def _describe(path: Path, about: Mapping[str, str]) -> None:
    import onnx

    program = onnx.load(str(path))
    onnx.helper.set_model_props(program, dict(about))
    onnx.save(program, str(path))


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(["batch", *map(str, tensor.shape[1:])])
