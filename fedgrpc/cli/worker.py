"""`fedgrpc worker`: every setting of a worker, the trainer it gets, and the call that runs it."""

from __future__ import annotations

import asyncio
import os
import socket
import typing
from collections.abc import Iterable, Mapping
from dataclasses import fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import click

from fedgrpc.cli.connection import client_settings, client_tls
from fedgrpc.cli.logs import LOGS, configure_logs
from fedgrpc.cli.options import Declare, Setting, SettingsCommand, pick
from fedgrpc.cli.value_types import DURATION, RATE, SIZE, NamedValues
from fedgrpc.codec.encoding import ENCODING_NAMES
from fedgrpc.datasets.partition import PARTITIONS, parse_part, parse_partition
from fedgrpc.errors import UsageError
from fedgrpc.process import keep_private, use_threads
from fedgrpc.protocol.tasks import Registration, Role
from fedgrpc.rpc.channel import Tls
from fedgrpc.rpc.retry import Backoff
from fedgrpc.trainer import TaskSetup, Trainer
from fedgrpc.worker.device import DeviceProfile
from fedgrpc.worker.process import run_worker
from fedgrpc.worker.settings import WorkerSettings
from fedgrpc.worker.task_loader import find_task, load_trainer
from fedgrpc.worker.throttle import Throttle

_place = Declare("Where", WorkerSettings)
_task = Declare("The learning task", TaskSetup)
_device = Declare("The device")
_slow = Declare("Honest slowness, to try out a fleet on one machine", Throttle)
_transfer = Declare("Transfer")
_service = Declare("The worker's own service")
_life = Declare("Life", WorkerSettings)
_limit = Declare("What the aggregator may ask for", WorkerSettings)
_retry = Declare("Life", Backoff)

ALLOWED_TASKS = ("fedgrpc.tasks.*",)
_ROLES = {"trainer": Role.TRAINER, "evaluator": Role.EVALUATOR}

SETTINGS: list[Setting] = [
    _place("--aggregator", "The aggregator to work for.", metavar="HOST:PORT", required=True),
    _place(
        "--name",
        "Unique in the fleet, or the second waits for the first to go; without: this machine's host name.",
        required=False,
    ),
    _place(
        "--state-dir",
        "Folder of what must survive a restart: unsent updates and the like; without: "
        "$XDG_STATE_HOME/fedgrpc/NAME (~/.local/state).",
        type=click.Path(path_type=Path, file_okay=False),
    ),
    _place(
        "--role",
        "trainer: train on local data. evaluator: score each committed version on held-out data.",
        type=click.Choice(list(_ROLES)),
        default="trainer",
    ),
    _task("--task", "package.module or package.module:Class; without: what the aggregator names.", metavar="REF"),
    _task(
        "--allow-task",
        "A task that the aggregator may name where there is no --task, installed on this device, as in "
        "mine.tasks.*; repeat for each.",
        name="allow_tasks",
        multiple=True,
        default=ALLOWED_TASKS,
        metavar="REF",
    ),
    _task("--model", "Model name, where the task knows several.", metavar="NAME"),
    _task("--data", "Folder or file of this device's data.", type=click.Path(path_type=Path, exists=True)),
    _task("--device", "auto, cpu, cuda or cuda:1.", metavar="DEVICE"),
    _task("--threads", "CPU threads to train with; without: as many as the libraries choose."),
    _task("--partition", f"Use a part of the data: {PARTITIONS}.", metavar="KIND"),
    _task("--part", "Which part, as in 3/10.", metavar="N/PARTS"),
    _task("--seed", "Of the partition and of the untrained model."),
    _task(
        "--option",
        "An option of the task's own; repeat for each.",
        name="options",
        type=NamedValues(),
        multiple=True,
        default=(),
        metavar="NAME=VALUE",
    ),
    _device("--device-class", "As in raspberry-pi-4; without: found out.", type=str, metavar="CLASS"),
    _device(
        "--profile",
        "Tell the aggregator this instead of what was found, as in cpu_cores=2; repeat for each of "
        + ", ".join(field.name for field in fields(DeviceProfile)),
        type=NamedValues(),
        multiple=True,
        default=(),
        metavar="NAME=VALUE",
    ),
    _transfer(
        "--encodings",
        "Offer to read and write only these (raw is always among them); without: all that fedgrpc has.",
        type=str,
        default=None,
        metavar="NAME,NAME",
    ),
    _slow("--slowdown", "Training takes this many times as long."),
    _slow("--link", "Pace downloads and uploads to this rate.", name="link_bits_per_second", type=RATE),
    _service(
        "--serve-address",
        "HOST:PORT of the service for this device's owner and its applications; 'none': do not serve.",
        default=WorkerSettings.serve_address,
        metavar="HOST:PORT",
    ),
    _service("--serve-tls-cert", "Certificate to serve with (PEM).", type=click.Path(path_type=Path, exists=True)),
    _service("--serve-tls-key", "Its key (PEM).", type=click.Path(path_type=Path, exists=True)),
    _life("--exit-when-run-ends/--stay", "Whether the process ends with the run.", name="exit_when_run_ends"),
    _life("--poll-wait", "Longest wait of a poll.", name="poll_wait_s", type=DURATION),
    _retry("--reconnect-first", "Longest wait before the first try to reconnect.", name="first_s", type=DURATION),
    _retry("--reconnect-cap", "Longest wait before any later one.", name="cap_s", type=DURATION),
    _life("--stall", "Give up a stream that has not moved for this long.", name="stall_s", type=DURATION),
    _life("--drain", "How long SIGTERM lets the task in hand go on.", name="drain_s", type=DURATION),
    _limit(
        "--max-model",
        "Take no larger model, bytes once decoded; without: a quarter of the memory that this process may use.",
        name="max_model_bytes",
        type=SIZE,
    ),
    _limit("--min-batch-size", "Take no task that trains on smaller batches."),
    _life("--spool-max-updates", "Unsent updates to keep at most."),
    _life("--spool-max", "Bytes of unsent updates to keep at most.", name="spool_max_bytes", type=SIZE),
    _life(
        "--spool-keep",
        "Keep unsent updates of another run this long, should its aggregator come back.",
        name="spool_keep_s",
        type=DURATION,
    ),
    *client_settings(),
    *LOGS,
]


def settings_from(values: Mapping[str, Any]) -> WorkerSettings:
    """The settings that these values of the command line stand for. Raises `UsageError`."""
    name = values["name"] or socket.gethostname()
    serve_tls = Tls(None, values["serve_tls_cert"], values["serve_tls_key"])
    more = {
        "name": name,
        "state_dir": values["state_dir"] or _default_state_dir(name),
        "role": _ROLES[values["role"]],
        "device": _profile_overrides(values),
        "tls": client_tls(values),
        "serve_address": None if values["serve_address"] == "none" else values["serve_address"],
        "serve_tls": None if serve_tls == Tls() else serve_tls,
        "throttle": pick(Throttle, values),
        "backoff": _backoff(values),
        "encodings": _encodings(values["encodings"]),
    }
    return pick(WorkerSettings, values, **more)


def _backoff(values: Mapping[str, Any]) -> Backoff:
    try:
        return pick(Backoff, values)
    except ValueError:
        raise UsageError("--reconnect-first must be above 0 and at most --reconnect-cap") from None


def _encodings(text: str | None) -> tuple[str, ...]:
    if text is None:
        return ENCODING_NAMES
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _default_state_dir(name: str) -> Path:
    try:
        root = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    except RuntimeError:
        raise UsageError("this user has no home folder; say where to keep the state with --state-dir") from None
    return Path(root) / "fedgrpc" / name


def _profile_overrides(values: Mapping[str, Any]) -> dict[str, Any]:
    overrides: dict[str, Any] = {}
    if values["device_class"] is not None:
        overrides["device_class"] = values["device_class"]
    kinds = typing.get_type_hints(DeviceProfile)
    for name, text in values["profile"]:
        overrides[name] = _parse_field(name, kinds.get(name, str), text)
    return overrides


def _parse_field(name: str, kind: type, text: str) -> Any:
    if kind is bool:
        if text not in ("true", "false"):
            raise UsageError(f"--profile {name} must be true or false, not {text!r}")
        return text == "true"
    try:
        return kind(text)
    except ValueError:
        raise UsageError(f"--profile {name} must be a whole number, not {text!r}") from None


def trainer_for(
    setup: TaskSetup, own_task: str | None, registration: Registration, allowed: Iterable[str] = ALLOWED_TASKS
) -> Trainer:
    """The learning task: the worker's own, else the aggregator's; the aggregator's model goes with its task.

    Code that the aggregator names is run only where it is `allowed`, and never from the working folder.
    """
    task = own_task or registration.learning_task
    if not task:
        raise UsageError("neither this worker nor its aggregator was started with --task")
    if own_task is None and not is_allowed(task, allowed):
        raise UsageError(
            f"the aggregator names the task {task[:200]!r}, which this device does not allow; "
            "start the worker with --task or --allow-task and its name"
        )
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
        options=setup.options,
        threads=setup.threads,
        here=own_task is not None,
    )


def is_allowed(task: str, allowed: Iterable[str]) -> bool:
    """Whether one of the patterns is of the task, or of its module."""
    module = task.partition(":")[0]
    return any(fnmatchcase(task, pattern) or fnmatchcase(module, pattern) for pattern in allowed)


def _run(**values: Any) -> int:
    keep_private()
    configure_logs(values)
    settings = settings_from(values)
    setup = pick(TaskSetup, values, options=dict(values["options"]))
    if setup.threads is not None:
        use_threads(setup.threads)
    own_task: str | None = values["task"]
    # Mistakes are told before anybody is asked.
    if own_task is not None:
        find_task(own_task)
    if setup.partition is not None and setup.part is not None:
        parse_partition(setup.partition)
        parse_part(setup.part)

    def build(registration: Registration) -> Trainer:
        return trainer_for(setup, own_task, registration, values["allow_tasks"])

    return asyncio.run(run_worker(settings, build_trainer=build))


COMMAND = SettingsCommand(
    "worker",
    _run,
    SETTINGS,
    "Work for an aggregator: train on this device's data, send updates, never the data.",
)
