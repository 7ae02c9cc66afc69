"""What a fleet test has found: a line for each device, and whether anything was lost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedgrpc.protocol.plans import local_model_plan_from_proto
from fedgrpc.submodels.plan import LocalModelPlan
from fedgrpc.v1.round_pb2 import Round, RoundPhase, TaskKind, TaskPhase, TaskRecord
from fedgrpc.words import size
from tools.containers.podman import Container

# (round, worker): one accepted update.
Accepted = set[tuple[int, str]]


@dataclass(frozen=True)
class DeviceLine:
    """One device over all training rounds; times are means over its accepted tasks, seconds."""

    name: str
    starts: int
    accepted: int
    selected: int
    local_s: float
    upload_s: float
    global_s: float
    download_s: float
    download_bytes: int
    upload_bytes: int
    peak_memory_bytes: int
    limit_bytes: int
    local_model: str = ""


def training_tasks(rounds: Iterable[Round]) -> list[TaskRecord]:
    """The tasks of all training rounds that were not cut off by the run's end."""
    return [
        task
        for record in rounds
        if record.kind == TaskKind.TASK_KIND_TRAIN and record.phase == RoundPhase.ROUND_PHASE_COMMITTED
        for task in record.tasks
    ]


def plans_trained(rounds: Iterable[Round], worker: str) -> list[LocalModelPlan]:
    """The plans of the local models that a worker's accepted updates are of, each once."""
    plans: list[LocalModelPlan] = []
    for task in training_tasks(rounds):
        if task.worker == worker and task.phase == TaskPhase.TASK_PHASE_ACCEPTED:
            plan = local_model_plan_from_proto(task.local_model)
            if plan not in plans:
                plans.append(plan)
    return plans


def device_line(name: str, container: Container, rounds: Sequence[Round]) -> DeviceLine:
    """What became of a device's tasks, and its container's peak."""
    tasks = [task for task in training_tasks(rounds) if task.worker == name]
    accepted = [task for task in tasks if task.phase == TaskPhase.TASK_PHASE_ACCEPTED]

    def mean(phase: str) -> float:
        times = [float(getattr(task.timings, f"{phase}_seconds")) for task in accepted]
        return sum(times) / len(times) if times else float("nan")

    return DeviceLine(
        name,
        container.lives,
        len(accepted),
        len(tasks),
        mean("local"),
        mean("upload"),
        mean("global"),
        mean("download"),
        sum(task.download_bytes for task in tasks),
        sum(task.upload_bytes for task in tasks),
        max([container.peak_memory_bytes, *(task.peak_memory_bytes for task in tasks)]),
        container.limits.memory_bytes,
        "; ".join(plan.to_line() for plan in plans_trained(rounds, name)),
    )


def markdown(lines: Sequence[DeviceLine]) -> str:
    """The table, as docs/deployment.md has it."""
    heads = ["device", "T_local", "T_upload", "T_global", "T_download", "down", "up", "peak memory of limit"]
    rows = [[*heads, "updates", "starts", "local model"], ["---", *["--:"] * (len(heads) + 1), "---"]]
    for line in lines:
        times = (line.local_s, line.upload_s, line.global_s, line.download_s)
        rows.append(
            [
                line.name,
                *("" if math.isnan(time_s) else f"{time_s:.2f} s" for time_s in times),
                size(line.download_bytes),
                size(line.upload_bytes),
                f"{line.peak_memory_bytes / 2**20:.0f} of {line.limit_bytes / 2**20:.0f} MiB",
                f"{line.accepted}/{line.selected}",
                str(line.starts),
                line.local_model,
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def accepted_in(rounds: Iterable[Round]) -> Accepted:
    """Every update that the aggregator's own history holds."""
    return {
        (record.number, task.worker)
        for record in rounds
        for task in record.tasks
        if task.phase == TaskPhase.TASK_PHASE_ACCEPTED
    }


def acknowledged_by(container: Container) -> Accepted:
    """Every update that a device was told is safe, over all its lives."""
    told = [event for event in container.events() if event["event"] == "update acknowledged"]
    return {(int(event["round"]), str(event["worker"])) for event in told}


def committed_versions(rounds: Iterable[Round]) -> list[int]:
    """In the order of the rounds."""
    wrote = [record for record in rounds if record.kind != TaskKind.TASK_KIND_EVALUATE]
    return [record.committed_version for record in wrote if record.committed_version]
