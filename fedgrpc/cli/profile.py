"""`fedgrpc profile`: measure this device with a learning task, and print its description for simulations.

The rule: what is timed is what a worker does in a task: train, score, encode the update. A first pass warms up.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

import click
import numpy as np

from fedgrpc.cli.learning_task import MODEL_SETTINGS, trainer_of
from fedgrpc.cli.options import Declare, Setting, SettingsCommand
from fedgrpc.codec.feedback import Residual, write_with_feedback
from fedgrpc.codec.layout import told_layout
from fedgrpc.codec.recipe import Recipe
from fedgrpc.trainer import Trainer, TrainJob, TrainResult, Weights
from fedgrpc.worker.delta import Delta
from fedgrpc.worker.device import detect, usable_memory_bytes

_RECIPE: Final = "int8+zstd"
_MIB: Final = 1 << 20

T = TypeVar("T")

_device = Declare("The device")

SETTINGS: list[Setting] = [
    *MODEL_SETTINGS,
    _device("--name", "Name of the class of devices; without: what this device is.", metavar="NAME"),
    _device("--seconds", "How long to train.", type=click.FloatRange(0, min_open=True), default=5.0),
    _device("--up", "Upload rate, in megabits per second: links are not measured.", type=float, default=20.0),
    _device("--down", "Download rate, in megabits per second.", type=float, default=20.0),
]


def _run(**values: Any) -> None:
    trainer = trainer_of(values)
    weights = trainer.initial_weights()
    measured = measure(trainer, weights, values["seconds"])
    name = values["name"] or detect().device_class or "this-device"
    click.echo(description(name, measured, values["up"], values["down"]))


def measure(trainer: Trainer, weights: Weights, seconds: float) -> Mapping[str, float]:
    """Return examples trained and scored in a second, and the seconds of a task besides. Raises `TaskError`."""
    # The first pass loads libraries and data, and says how many passes fit.
    _, epoch_s = _timed(lambda: trainer.train(_copied(weights), TrainJob()))
    passes = max(1, round(seconds / epoch_s))
    result, trained_s = _timed(lambda: trainer.train(_copied(weights), TrainJob(epochs=passes)))
    found = {"examples_per_s": passes * result.example_count / trained_s}
    scores, scored_s = _timed(lambda: trainer.evaluate(_copied(weights)))
    if scores is not None:
        found["scored_per_s"] = scores.example_count / scored_s
    _, found["overhead_s"] = _timed(lambda: _encode(weights, result))
    return found


def _timed(call: Callable[[], T]) -> tuple[T, float]:
    began = time.perf_counter()
    result = call()
    return result, max(time.perf_counter() - began, 1e-9)


def _copied(weights: Weights) -> Weights:
    """Return weights that the trainer may change."""
    return {name: np.array(array) for name, array in weights.items()}


def _encode(given: Weights, result: TrainResult) -> None:
    """Encode an update as a worker does."""
    delta = Delta(result.weights, given if result.start is None else result.start)
    recipe = Recipe.parse(_RECIPE).for_layout(told_layout(given))
    write_with_feedback(delta, Residual(), recipe, io.BytesIO(), np.random.default_rng(0), delta.layout)


def description(name: str, measured: Mapping[str, float], up_mbit: float, down_mbit: float) -> str:
    """Return the description of such devices, to be put into the file of an experiment."""
    lines = ["[[devices]]", f'name = "{name}"', "count = 1"]
    lines += [f"{key} = {value:.4g}" for key, value in measured.items()]
    lines += [f"memory_mb = {usable_memory_bytes() // _MIB}"]
    lines += [f"up_mbit = {up_mbit:g}    # not measured", f"down_mbit = {down_mbit:g}    # not measured"]
    return "\n".join(lines)


COMMAND = SettingsCommand(
    "profile", _run, SETTINGS, "Measure this device with a learning task, and describe it for `fedgrpc simulate`."
)
