"""`fedgrpc plan`: the cost of each local-model plan on a device, and the plan that the device would get."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from rich.table import Table

from fedgrpc.cli.as_json import json_text
from fedgrpc.cli.connection import FILE
from fedgrpc.cli.learning_task import MODEL_SETTINGS, trainer_of
from fedgrpc.cli.options import AS_JSON, Declare, Setting, SettingsCommand
from fedgrpc.cli.planning import FleetSnapshot, PlannedDevice, PlannedModel, PlanRequest, fleet_snapshot, measured
from fedgrpc.cli.reach import reach_settings, reached
from fedgrpc.cli.values import DURATION, RATE, SIZE, read_file
from fedgrpc.cli.view import piped_console, print_table
from fedgrpc.errors import UsageError
from fedgrpc.submodels.cost import DeviceLimits, Observation, Prediction, predict
from fedgrpc.submodels.plan import LocalModelPlan
from fedgrpc.submodels.plan_choice import misfit
from fedgrpc.submodels.plan_table import PlanTable
from fedgrpc.submodels.technique_cost import saves_nothing
from fedgrpc.trainer import Trainer, activation_bytes, full_width_tensors
from fedgrpc.words import seconds, size
from fedgrpc.worker.device import resident_bytes

LADDER: Final = (LocalModelPlan(), LocalModelPlan(0.5), LocalModelPlan(0.25))
ENCODING: Final = "int8+zstd"
DEADLINE_S: Final = 600.0
_SHOWN: Final = 4
# Needed by a part of a plan, of which models are made on purpose.
_CUT: Final = {"depth": "early exits", "rank": "adapters"}

_model = Declare("The model")
_plans = Declare("The plans")
_device = Declare("The device")
_fleet = Declare("Or the devices of a running aggregator, with the cost of their past tasks")

SETTINGS: list[Setting] = [
    *MODEL_SETTINGS,
    _model("--encoding", "Recipe of models; without: the aggregator's, or int8+zstd.", type=str, metavar="RECIPE"),
    _plans(
        "--plans",
        "TOML file as for `fedgrpc aggregator --local-models`; without: the aggregator's, or all, half and a "
        "quarter of the channels.",
        type=FILE,
    ),
    _plans(
        "--deadline",
        "Deadline of a round; without: the aggregator's, or 10 min.",
        name="deadline_s",
        type=DURATION,
    ),
    _plans(
        "--epochs", "Passes over the local data in a round.", type=click.FloatRange(0, min_open=True), default=1.0
    ),
    _device(
        "--device-class", "Device class, which may have a plan of its own.", type=str, default="", metavar="CLASS"
    ),
    _device("--memory", "Memory that the worker may use.", name="memory_bytes", type=SIZE),
    _device("--uplink", "Rate of the link, up.", name="uplink_bits_per_second", type=RATE),
    _device("--downlink", "Rate of the link, down.", name="downlink_bits_per_second", type=RATE),
    _device("--local-time", "Measured T_local of the whole model.", name="local_s", type=DURATION),
    _device(
        "--measure",
        "Train this many steps of each plan here to measure this device; 0: do not.",
        name="measured_steps",
        type=click.IntRange(0, 1000),
        default=0,
    ),
    _fleet("--aggregator", "Aggregator to ask.", metavar="HOST:PORT"),
    _fleet("--worker", "One of its workers; without: all trainers.", metavar="NAME"),
    AS_JSON,
    *reach_settings()[1:],
]


def _run(**values: Any) -> None:
    asks = any(values[way] for way in ("aggregator", "data_dir", "context"))
    if values["worker"] and not asks:
        raise UsageError("--worker names a worker of the aggregator that --aggregator asks")
    trainer = trainer_of(values)
    process_bytes = resident_bytes()
    fleet = asyncio.run(_snapshot(values)) if asks else None
    table, whose = _plans_of(values["plans"], fleet)
    model = PlannedModel.of(trainer, values["encoding"] or ENCODING)
    deadline_s = values["deadline_s"] or (fleet.deadline_s if fleet else DEADLINE_S)
    request = PlanRequest(model, table, deadline_s)
    if model.channels is None and not all(plan.sub_model(0).whole for plan in request.plans):
        raise UsageError(f"the model of {values['task']} cannot be sliced, so it has no plans for a part of it")
    if model.channels is not None:
        useless = PlanTable(automatic=request.plans).useless_for(model.channels) & _CUT.keys()
        for part in sorted(useless):
            raise UsageError(
                f"the model of {values['task']} has no {_CUT[part]}, so a plan with a {part} changes nothing"
            )
    devices = fleet.devices(model, values["worker"]) if fleet else [_here(values, trainer, request, process_bytes)]
    agreed = {planned.encodings for planned in devices if not values["encoding"]} - {("", "")}
    requests = {each: replace(request, model=PlannedModel.of(trainer, *each)) for each in agreed}
    decided = [(planned, requests.get(planned.encodings, request)) for planned in devices]
    if values["as_json"]:
        click.echo(json_text([_plain(*each) for each in decided]))
        return
    console = piped_console()
    console.print(f"plans: {whose}; a round has {seconds(deadline_s)}", highlight=False, soft_wrap=True)
    for line in _whole_lines(trainer, request.plans):
        console.print(line, highlight=False, soft_wrap=True)
    console.print()
    for each in decided:
        _show(console, *each)


def _whole_lines(trainer: Trainer, plans: Sequence[LocalModelPlan]) -> list[str]:
    """Name the layers that stay whole in narrower plans, and why."""
    if all(plan.width == 1 for plan in plans):
        return []
    return [
        f"kept whole at every width: {_some(names)}: {reason}" for names, reason in full_width_tensors(trainer)
    ]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _plans_of(path: Path | None, fleet: FleetSnapshot | None) -> tuple[PlanTable, str]:
    """Return the plans to choose from, and where they come from. Raises `UsageError`."""
    if path is not None:
        return read_file(path, PlanTable.from_toml), str(path)
    if fleet is not None and not fleet.plans.trivial:
        return fleet.plans, "those of the aggregator"
    every = "all, half and a quarter of the channels"
    whole = ", though the aggregator gives every device the whole model" if fleet else ""
    return PlanTable(automatic=LADDER), every + whole


def _here(values: Mapping[str, Any], trainer: Trainer, request: PlanRequest, process_bytes: int) -> PlannedDevice:
    """Return the device that the flags describe, or this one; its worker takes as much as this process."""
    model, plans = request.model, request.plans
    rates = (values["uplink_bits_per_second"] or 0.0, values["downlink_bits_per_second"] or 0.0)
    device = DeviceLimits(values["memory_bytes"] or 0, *rates, process_bytes, activation_bytes(trainer))
    history: list[Observation] = []
    if values["measured_steps"]:
        tell = partial(click.echo, err=True)
        history += measured(trainer, model, plans, values["measured_steps"], values["epochs"], tell)
    if values["local_s"]:
        whole = model.size_of(LocalModelPlan())
        history.append(Observation(whole.share, whole.weights_bytes, 0, values["local_s"], 0, 0, 0))
    name = "this device" if values["measured_steps"] else "the device described"
    return PlannedDevice(name, device, tuple(history), device_class=values["device_class"])


async def _snapshot(values: Mapping[str, Any]) -> FleetSnapshot:
    async with reached(values) as aggregator:
        return await fleet_snapshot(aggregator)


def _show(console: Console, planned: PlannedDevice, request: PlanRequest) -> None:
    choice = request.choice_for(planned)
    about = f" ({planned.device_class})" if planned.device_class else ""
    tasks = f"{len(planned.history)} task{'' if len(planned.history) == 1 else 's'} measured"
    console.print(f"{planned.name}{about}: {tasks}", style="bold", highlight=False)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    headings = ("", "plan", "T_download", "T_local", "T_upload", "T", "memory", "down", "up", "")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("", "plan") else "right", no_wrap=True)
    for plan in request.plans:
        sizes = request.model.size_of(plan, planned.history)
        cost = predict(planned.device, planned.history, sizes, planned.peers)
        times = (cost.download_s, cost.local_s, cost.upload_s)
        table.add_row(
            "*" if plan == choice.plan else "",
            plan.to_line(),
            *("?" if part is None else seconds(part) for part in times),
            ("" if None not in times else "at least ") + seconds(cost.total_s),
            size(cost.peak_memory_bytes),
            size(sizes.download_bytes),
            size(sizes.upload_bytes),
            misfit(planned.device, cost, request.deadline_s),
        )
    print_table(console, table)
    for plan in request.plans:
        if why := saves_nothing(plan):
            console.print(f"{plan.to_line()}: {why}", highlight=False, soft_wrap=True)
    console.print(f"chosen: {choice.plan.to_line()}: {choice.reason}", highlight=False, soft_wrap=True)
    if off := errors_line(planned):
        console.print(off, highlight=False, soft_wrap=True)
    console.print()


def errors_line(planned: PlannedDevice) -> str:
    """Say how far the aggregator's predictions of this worker's tasks were off; "" where it made none."""
    parts = ("download", "local", "upload", "memory")
    medians = {
        part: statistics.median(each[part] for each in planned.errors if part in each)
        for part in parts
        if any(part in each for each in planned.errors)
    }
    shown = ", ".join(f"{part} {error:+.0%}" for part, error in medians.items())
    return f"predicted against measured, median of {len(planned.errors)} tasks: {shown}" if shown else ""


def _plain(planned: PlannedDevice, request: PlanRequest) -> dict[str, Any]:
    choice = request.choice_for(planned)

    def row(plan: LocalModelPlan) -> dict[str, Any]:
        size = request.model.size_of(plan, planned.history)
        cost: Prediction = predict(planned.device, planned.history, size, planned.peers)
        total = {"total_s": cost.total_s, "misfit": misfit(planned.device, cost, request.deadline_s)}
        return {**asdict(size), **asdict(cost), **total, "plan": plan.to_toml(), "note": saves_nothing(plan)}

    return {
        "device": planned.name,
        "device_class": planned.device_class,
        "measured_tasks": len(planned.history),
        "plans": [row(plan) for plan in request.plans],
        "chosen": choice.plan.to_toml(),
        "reason": choice.reason,
        "errors": [dict(each) for each in planned.errors],
    }


COMMAND = SettingsCommand(
    "plan", _run, SETTINGS, "Show the cost of each local-model plan on a device, and the plan it would get."
)
