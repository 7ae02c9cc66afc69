"""`fedgrpc plan`: what each plan would cost a device, and which one it would get, before anything is trained."""

from __future__ import annotations

import asyncio
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import click
from rich.table import Table

from fedgrpc.aggregation.compression_plan import CompressionPlan, PlanTable
from fedgrpc.aggregation.prediction import Choice, Device, Observation, Prediction, choose, misfit, predict
from fedgrpc.cli.common import FILE, client_settings, client_tls
from fedgrpc.cli.operator import operator
from fedgrpc.cli.options import Declare, NamedValues, Setting, SettingsCommand
from fedgrpc.cli.planning import Model, Subject, measured, model_of, subjects
from fedgrpc.cli.quantities import DURATION, RATE, SIZE
from fedgrpc.cli.view import piped_console, print_table, seconds, size
from fedgrpc.errors import UsageError
from fedgrpc.worker.trainer import Trainer, load_trainer

LADDER: Final = (CompressionPlan(), CompressionPlan(0.5), CompressionPlan(0.25))

_model = Declare("The model")
_plans = Declare("The plans")
_device = Declare("The device")
_fleet = Declare("Or the devices of a running aggregator, with what their tasks have cost")

SETTINGS: list[Setting] = [
    _model("--task", "package.module or package.module:Class.", metavar="REF", required=True),
    _model("--model", "Model name, where the task knows several.", metavar="NAME"),
    _model("--data", "Folder or file of data.", type=click.Path(path_type=Path, exists=True)),
    _model("--option", "Of the task's own.", name="options", type=NamedValues(), multiple=True, default=()),
    _model("--encoding", "How models and updates travel.", default="int8+zstd", metavar="RECIPE"),
    _plans(
        "--plans",
        "TOML file as of `fedgrpc aggregator --local-models`; without: all, half and a quarter of the channels.",
        type=FILE,
    ),
    _plans("--deadline", "Of a round.", name="deadline_s", type=DURATION, default=600.0),
    _plans(
        "--epochs", "Passes over the local data in a round.", type=click.FloatRange(0, min_open=True), default=1.0
    ),
    _device("--memory", "Memory that the worker may use.", name="memory_bytes", type=SIZE),
    _device("--uplink", "Rate of the link, up.", name="uplink_bits_per_second", type=RATE),
    _device("--downlink", "Rate of the link, down.", name="downlink_bits_per_second", type=RATE),
    _device("--local-time", "T_local of the whole model, as it was measured.", name="local_s", type=DURATION),
    _device(
        "--measure",
        "Train this many steps of each plan's width here, to know this device's speed and memory; 0: do not.",
        name="measured_steps",
        type=click.IntRange(0, 1000),
        default=0,
    ),
    _fleet("--aggregator", "Ask it.", metavar="HOST:PORT"),
    _fleet("--worker", "Of one of its workers; without: of all.", metavar="NAME"),
    Declare("What to show")("--json/--table", "JSON, for programs.", name="as_json", default=False),
    *client_settings(),
]


def candidates(path: Path | None) -> tuple[CompressionPlan, ...]:
    """The plans to choose from, most capable first. Raises UsageError."""
    if path is None:
        return LADDER
    table = PlanTable.from_toml(path.read_text())
    plans = table.automatic or (table.default, *table.classes.values())
    return tuple(dict.fromkeys(plans))


def named(plan: CompressionPlan) -> str:
    """A plan in one line."""
    return ", ".join(line for line in plan.to_toml().splitlines() if line) or "the whole model"


def _run(**values: Any) -> None:
    if values["worker"] and not values["aggregator"]:
        raise UsageError("--worker names a worker of the aggregator that --aggregator asks")
    trainer = load_trainer(
        values["task"], model=values["model"], data=values["data"], options=dict(values["options"])
    )
    model, plans = model_of(trainer, values["encoding"]), candidates(values["plans"])
    if model.channels is None and any(plan.width < 1 for plan in plans):
        raise UsageError(f"the model of {values['task']} cannot be sliced, so it has no plans of less width")
    found = [_here(values, trainer, model, plans)]
    if values["aggregator"]:
        found = asyncio.run(_asked(values, model))
    decided = [(subject, _choice(subject, model, plans, values["deadline_s"])) for subject in found]
    if values["as_json"]:
        click.echo(json.dumps([_plain(*each, model, plans, values["deadline_s"]) for each in decided], indent=2))
        return
    for subject, choice in decided:
        _show(subject, choice, model, plans, values["deadline_s"])


def _here(values: Mapping[str, Any], trainer: Trainer, model: Model, plans: Sequence[CompressionPlan]) -> Subject:
    """The device that the flags describe, or this one."""
    rates = (values["uplink_bits_per_second"] or 0.0, values["downlink_bits_per_second"] or 0.0)
    device = Device(values["memory_bytes"] or 0, *rates)
    history: list[Observation] = []
    if values["measured_steps"] and not values["aggregator"]:
        widths = [plan.width for plan in plans]
        history += measured(trainer, model, widths, values["measured_steps"], values["epochs"])
    if values["local_s"]:
        whole = model.size_of(CompressionPlan())
        history.append(Observation(whole.share, whole.weights_bytes, 0, values["local_s"], 0, 0, 0))
    return Subject("this device" if values["measured_steps"] else "the device described", device, tuple(history))


async def _asked(values: Mapping[str, Any], model: Model) -> list[Subject]:
    async with operator(values["aggregator"], client_tls(dict(values))) as aggregator:
        return await subjects(aggregator, model, values["worker"])


def _choice(subject: Subject, model: Model, plans: Sequence[CompressionPlan], deadline_s: float) -> Choice:
    return choose(plans, model.size_of, subject.device, subject.history, deadline_s)


def _show(
    subject: Subject, choice: Choice, model: Model, plans: Sequence[CompressionPlan], deadline_s: float
) -> None:
    console = piped_console()
    console.print(f"{subject.name}: {len(subject.history)} tasks measured", style="bold", highlight=False)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    headings = ("", "plan", "T_download", "T_local", "T_upload", "T", "memory", "down", "up", "")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("", "plan") else "right", no_wrap=True)
    for plan in plans:
        its, cost = model.size_of(plan), predict(subject.device, subject.history, model.size_of(plan))
        times = (cost.download_s, cost.local_s, cost.upload_s)
        table.add_row(
            "*" if plan == choice.plan else "",
            named(plan),
            *("?" if part is None else seconds(part) for part in times),
            ("" if None not in times else "at least ") + seconds(cost.total_s),
            size(cost.peak_memory_bytes),
            size(its.download_bytes),
            size(its.upload_bytes),
            misfit(subject.device, cost, deadline_s),
        )
    print_table(console, table)
    console.print(f"chosen: {named(choice.plan)}: {choice.reason}", highlight=False, soft_wrap=True)
    if off := errors_line(subject):
        console.print(off, highlight=False, soft_wrap=True)
    console.print()


def errors_line(subject: Subject) -> str:
    """How far the aggregator's own predictions of this worker's tasks were off; "" where it made none."""
    parts = ("download", "local", "upload", "memory")
    medians = {
        part: statistics.median(each[part] for each in subject.errors if part in each)
        for part in parts
        if any(part in each for each in subject.errors)
    }
    shown = ", ".join(f"{part} {error:+.0%}" for part, error in medians.items())
    return f"predicted against measured, median of {len(subject.errors)} tasks: {shown}" if shown else ""


def _plain(
    subject: Subject, choice: Choice, model: Model, plans: Sequence[CompressionPlan], deadline_s: float
) -> dict[str, Any]:
    def row(plan: CompressionPlan) -> dict[str, Any]:
        cost: Prediction = predict(subject.device, subject.history, model.size_of(plan))
        why_not = misfit(subject.device, cost, deadline_s)
        total = {"total_s": cost.total_s, "misfit": why_not}
        return {"plan": plan.to_toml(), **asdict(model.size_of(plan)), **asdict(cost), **total}

    return {
        "device": subject.name,
        "measured_tasks": len(subject.history),
        "plans": [row(plan) for plan in plans],
        "chosen": choice.plan.to_toml(),
        "reason": choice.reason,
        "errors": [dict(each) for each in subject.errors],
    }


COMMAND = SettingsCommand(
    "plan", _run, SETTINGS, "What each plan of local models would cost a device, and which one it would get."
)
