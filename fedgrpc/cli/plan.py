"""`fedgrpc plan`: what each plan would cost a device, and which one it would get, before anything is trained."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from rich.table import Table

from fedgrpc.cli.as_json import json_text
from fedgrpc.cli.connection import FILE, client_settings, client_tls
from fedgrpc.cli.options import Declare, Setting, SettingsCommand
from fedgrpc.cli.planning import Asked, Model, Subject, ask, measured
from fedgrpc.cli.value_types import DURATION, RATE, SIZE, NamedValues
from fedgrpc.cli.view import piped_console, print_table, seconds, size
from fedgrpc.client import connect
from fedgrpc.errors import UsageError
from fedgrpc.submodels.cost import Choice, Device, Observation, Prediction, choose_of, misfit, predict
from fedgrpc.submodels.plan import CompressionPlan, PlanTable
from fedgrpc.trainer import Trainer, kept_whole
from fedgrpc.worker.task_loader import load_trainer

LADDER: Final = (CompressionPlan(), CompressionPlan(0.5), CompressionPlan(0.25))
ENCODING: Final = "int8+zstd"
DEADLINE_S: Final = 600.0
_SHOWN: Final = 4

_model = Declare("The model")
_plans = Declare("The plans")
_device = Declare("The device")
_fleet = Declare("Or the devices of a running aggregator, with what their tasks have cost")

SETTINGS: list[Setting] = [
    _model("--task", "package.module or package.module:Class.", metavar="REF", required=True),
    _model("--model", "Model name, where the task knows several.", metavar="NAME"),
    _model("--data", "Folder or file of data.", type=click.Path(path_type=Path, exists=True)),
    _model("--option", "Of the task's own.", name="options", type=NamedValues(), multiple=True, default=()),
    _model(
        "--encoding", "How models travel; without: the aggregator's, or int8+zstd.", type=str, metavar="RECIPE"
    ),
    _plans(
        "--plans",
        "TOML file as of `fedgrpc aggregator --local-models`; without: the aggregator's, or all, half and a "
        "quarter of the channels.",
        type=FILE,
    ),
    _plans("--deadline", "Of a round; without: the aggregator's, or 10 min.", name="deadline_s", type=DURATION),
    _plans(
        "--epochs", "Passes over the local data in a round.", type=click.FloatRange(0, min_open=True), default=1.0
    ),
    _device("--device-class", "It may have a plan of its own.", type=str, default="", metavar="CLASS"),
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
    _fleet("--worker", "One of its workers; without: all that train.", metavar="NAME"),
    Declare("What to show")("--json/--table", "JSON, for programs.", name="as_json", default=False),
    *client_settings(),
]


@dataclass(frozen=True)
class Question:
    """What is asked of each device: which of these plans it gets, for this model, by that deadline."""

    model: Model
    table: PlanTable
    deadline_s: float

    @property
    def plans(self) -> tuple[CompressionPlan, ...]:
        """Every plan that some device may get, once."""
        own = self.table.classes.values()
        return tuple(dict.fromkeys((*self.table.automatic, *own) if self.table.automatic else self.table.plans))

    def answer(self, subject: Subject) -> Choice:
        """As the aggregator decides it."""
        size_of = partial(self.model.size_of, history=subject.history)
        about = subject.device, subject.history, self.deadline_s
        return choose_of(self.table, subject.device_class, size_of, *about)


def _run(**values: Any) -> None:
    if values["worker"] and not values["aggregator"]:
        raise UsageError("--worker names a worker of the aggregator that --aggregator asks")
    trainer = load_trainer(
        values["task"], model=values["model"], data=values["data"], options=dict(values["options"])
    )
    asked = asyncio.run(_ask(values)) if values["aggregator"] else None
    table, whose = _plans_of(values["plans"], asked)
    model = Model.of(trainer, values["encoding"] or ENCODING)
    deadline_s = values["deadline_s"] or (asked.deadline_s if asked else DEADLINE_S)
    question = Question(model, table, deadline_s)
    if model.channels is None and any(plan.width < 1 for plan in question.plans):
        raise UsageError(f"the model of {values['task']} cannot be sliced, so it has no plans of less width")
    subjects = asked.subjects(model) if asked else [_here(values, trainer, question)]
    told = {subject.encodings for subject in subjects if not values["encoding"]} - {("", "")}
    questions = {each: replace(question, model=Model.of(trainer, *each)) for each in told}
    decided = [(subject, questions.get(subject.encodings, question)) for subject in subjects]
    if values["as_json"]:
        click.echo(json_text([_plain(*each) for each in decided]))
        return
    console = piped_console()
    console.print(f"plans: {whose}; a round has {seconds(deadline_s)}", highlight=False, soft_wrap=True)
    for line in _whole_lines(trainer, question.plans):
        console.print(line, highlight=False, soft_wrap=True)
    console.print()
    for subject, its in decided:
        _show(console, subject, its)


def _whole_lines(trainer: Trainer, plans: Sequence[CompressionPlan]) -> list[str]:
    """What narrower plans cannot make narrower, and why."""
    if all(plan.width == 1 for plan in plans):
        return []
    return [f"kept whole at every width: {_some(names)}: {reason}" for names, reason in kept_whole(trainer)]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _plans_of(path: Path | None, asked: Asked | None) -> tuple[PlanTable, str]:
    """The plans to choose from, and whose they are. Raises UsageError."""
    if path is not None:
        return PlanTable.from_toml(path.read_text()), str(path)
    if asked is not None and not asked.plans.trivial:
        return asked.plans, "those of the aggregator"
    every = "all, half and a quarter of the channels"
    whole = ", though the aggregator gives every device the whole model" if asked else ""
    return PlanTable(automatic=LADDER), every + whole


def _here(values: Mapping[str, Any], trainer: Trainer, question: Question) -> Subject:
    """The device that the flags describe, or this one."""
    model, plans = question.model, question.plans
    rates = (values["uplink_bits_per_second"] or 0.0, values["downlink_bits_per_second"] or 0.0)
    device = Device(values["memory_bytes"] or 0, *rates)
    history: list[Observation] = []
    if values["measured_steps"]:
        widths = [plan.width for plan in plans]
        history += measured(trainer, model, widths, values["measured_steps"], values["epochs"])
    if values["local_s"]:
        whole = model.size_of(CompressionPlan())
        history.append(Observation(whole.share, whole.weights_bytes, 0, values["local_s"], 0, 0, 0))
    name = "this device" if values["measured_steps"] else "the device described"
    return Subject(name, device, tuple(history), device_class=values["device_class"])


async def _ask(values: Mapping[str, Any]) -> Asked:
    async with connect(values["aggregator"], client_tls(dict(values))) as aggregator:
        return await ask(aggregator, values["worker"])


def _show(console: Console, subject: Subject, question: Question) -> None:
    choice = question.answer(subject)
    about = f" ({subject.device_class})" if subject.device_class else ""
    tasks = f"{len(subject.history)} task{'' if len(subject.history) == 1 else 's'} measured"
    console.print(f"{subject.name}{about}: {tasks}", style="bold", highlight=False)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    headings = ("", "plan", "T_download", "T_local", "T_upload", "T", "memory", "down", "up", "")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("", "plan") else "right", no_wrap=True)
    for plan in question.plans:
        its = question.model.size_of(plan, subject.history)
        cost = predict(subject.device, subject.history, its)
        times = (cost.download_s, cost.local_s, cost.upload_s)
        table.add_row(
            "*" if plan == choice.plan else "",
            plan.to_line(),
            *("?" if part is None else seconds(part) for part in times),
            ("" if None not in times else "at least ") + seconds(cost.total_s),
            size(cost.peak_memory_bytes),
            size(its.download_bytes),
            size(its.upload_bytes),
            misfit(subject.device, cost, question.deadline_s),
        )
    print_table(console, table)
    console.print(f"chosen: {choice.plan.to_line()}: {choice.reason}", highlight=False, soft_wrap=True)
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


def _plain(subject: Subject, question: Question) -> dict[str, Any]:
    choice = question.answer(subject)

    def row(plan: CompressionPlan) -> dict[str, Any]:
        size = question.model.size_of(plan, subject.history)
        cost: Prediction = predict(subject.device, subject.history, size)
        total = {"total_s": cost.total_s, "misfit": misfit(subject.device, cost, question.deadline_s)}
        return {"plan": plan.to_toml(), **asdict(size), **asdict(cost), **total}

    return {
        "device": subject.name,
        "device_class": subject.device_class,
        "measured_tasks": len(subject.history),
        "plans": [row(plan) for plan in question.plans],
        "chosen": choice.plan.to_toml(),
        "reason": choice.reason,
        "errors": [dict(each) for each in subject.errors],
    }


COMMAND = SettingsCommand(
    "plan", _run, SETTINGS, "What each plan of local models would cost a device, and which one it would get."
)
