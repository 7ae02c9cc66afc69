"""`fedgrpc worker`: the settings of a worker, its learning task, and its start."""

from __future__ import annotations

import asyncio
import os
import socket
import typing
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from fedgrpc.cli.connection import FILE, client_settings, client_tls
from fedgrpc.cli.learning_task import option_setting
from fedgrpc.cli.options import Declare, Setting, SettingsCommand, pick
from fedgrpc.cli.process import LOGS, begin, join_token
from fedgrpc.cli.values import DURATION, RATE, SIZE, NamedValues
from fedgrpc.codec.encoding import encoding_names, load_encodings
from fedgrpc.datasets.partition import PARTITIONS, parse_part, parse_partition
from fedgrpc.errors import UsageError
from fedgrpc.process import use_threads
from fedgrpc.protocol.devices import DeviceProfile
from fedgrpc.protocol.tasks import Registration, WorkerRole
from fedgrpc.rpc.channel import Tls
from fedgrpc.rpc.retry import Backoff
from fedgrpc.trainer import TaskSetup, Trainer
from fedgrpc.worker.device import usual_threads
from fedgrpc.worker.process import BuildTrainer, run_worker
from fedgrpc.worker.settings import WorkerSettings
from fedgrpc.worker.task_choice import ALLOWED_TASKS, trainer_for
from fedgrpc.worker.task_loader import find_task, reference_of
from fedgrpc.worker.throttle import Throttle

_place = Declare("Where", WorkerSettings)
_task = Declare("The learning task", TaskSetup)
_device = Declare("The device")
_slow = Declare("Artificial slowness, to try out a fleet on one machine", Throttle)
_transfer = Declare("Transfer")
_service = Declare("The worker's own service")
_life = Declare("Life", WorkerSettings)
_limit = Declare("What the aggregator may ask for", WorkerSettings)
_retry = Declare("Life", Backoff)

_ROLES = {"trainer": WorkerRole.TRAINER, "evaluator": WorkerRole.EVALUATOR}

SETTINGS: list[Setting] = [
    _place("--aggregator", "Aggregator to work for.", metavar="HOST:PORT", required=True),
    _place(
        "--join",
        "Join token of the aggregator, once; or a file with it, or - for standard input. From then on the "
        "device's certificate says its name and role.",
        type=str,
        default=None,
        metavar="TOKEN",
    ),
    _place(
        "--name",
        "Name, unique in the fleet, to join or work under; without: this machine's host name.",
        required=False,
    ),
    _place(
        "--state-dir",
        "Folder of unsent updates and other state that survives restarts; without: "
        "$XDG_STATE_HOME/fedgrpc/NAME (~/.local/state).",
        type=click.Path(path_type=Path, file_okay=False),
    ),
    _place(
        "--role",
        "trainer: train on local data. evaluator: score each committed version on held-out data.",
        type=click.Choice(list(_ROLES)),
        default="trainer",
    ),
    _task(
        "--task",
        "Learning task, package.module or package.module:Class; without: the aggregator's.",
        metavar="REF",
    ),
    _task(
        "--allow-task",
        "Installed tasks that runs may choose, as in mine.tasks.*; repeat for each. Without: that of --task, or "
        "without that, fedgrpc.tasks.*.",
        name="allow_tasks",
        multiple=True,
        default=(),
        metavar="REF",
    ),
    _task("--model", "Model name, where the task knows several.", metavar="NAME"),
    _task("--data", "Folder or file of this device's data.", type=click.Path(path_type=Path, exists=True)),
    _task("--device", "Device to train on: auto, cpu, cuda or cuda:1.", metavar="DEVICE"),
    _task("--threads", "CPU threads to train with; without: a container's limit, else the libraries' own choice."),
    _task("--partition", f"Split the data, and train on one part: {PARTITIONS}.", metavar="KIND"),
    _task("--part", "Part to train on, as in 3/10.", metavar="N/PARTS"),
    _task("--seed", "Seed of the partition and of the untrained model."),
    option_setting(_task),
    _device("--device-class", "Device class, as in raspberry-pi-4; without: detected.", type=str, metavar="CLASS"),
    _device(
        "--profile",
        "Report this in place of the detected value, as in cpu_cores=2; repeat for each of "
        + ", ".join(field.name for field in fields(DeviceProfile) if field.name != "labels"),
        type=NamedValues(),
        multiple=True,
        default=(),
        metavar="NAME=VALUE",
    ),
    _device(
        "--label",
        "Label of this device, by which runs may choose it, as in site=north; repeat for each.",
        name="labels",
        type=NamedValues(),
        multiple=True,
        default=(),
        metavar="NAME=VALUE",
    ),
    _transfer(
        "--encodings",
        "Encodings to support (raw always is); without: all of them.",
        type=str,
        default=None,
        metavar="NAME,NAME",
    ),
    _slow("--slowdown", "Train this many times slower."),
    _slow("--link", "Pace downloads and uploads to this rate.", name="link_bits_per_second", type=RATE),
    _service(
        "--serve-address",
        "Address of the service for this device's owner and its applications; unix:PATH: a socket that this user "
        "alone may open; 'none': no service.",
        default=WorkerSettings.serve_address,
        metavar="HOST:PORT",
    ),
    _service("--serve-tls-cert", "Certificate to serve with (PEM).", type=click.Path(path_type=Path, exists=True)),
    _service("--serve-tls-key", "Key of that certificate (PEM).", type=click.Path(path_type=Path, exists=True)),
    _life(
        "--exit-when-run-ends/--stay",
        "End the process with the run, or stay for further runs and releases.",
        name="exit_when_run_ends",
    ),
    _life("--poll-wait", "Longest wait of a poll.", name="poll_wait_s", type=DURATION),
    _retry("--reconnect-first", "Longest wait before the first try to reconnect.", name="first_s", type=DURATION),
    _retry("--reconnect-cap", "Longest wait before any later try.", name="cap_s", type=DURATION),
    _life("--stall", "Give up a stream that has not moved for this long.", name="stall_s", type=DURATION),
    _life("--drain", "How long SIGTERM lets the current task continue.", name="drain_s", type=DURATION),
    _limit(
        "--max-model",
        "Largest model to accept, decoded; without: what can be trained in the memory that this process may use.",
        name="max_model_bytes",
        type=SIZE,
    ),
    _limit(
        "--allow-algorithm",
        "Installed classes that runs may name as their algorithm, as in mine.*; repeat for each. Without: "
        "fedgrpc's own alone.",
        name="allow_algorithms",
        multiple=True,
        default=(),
        metavar="REF",
    ),
    _limit("--min-batch-size", "Smallest batches that a task may ask for."),
    _limit(
        "--only-secure/--any-aggregation",
        "Train only where updates are summed under masks (docs/secure_aggregation.md).",
    ),
    _limit(
        "--secure-colluding",
        "Join only secure sums in which so many neighbours may work with the aggregator and learn nothing more.",
    ),
    _limit(
        "--secure-min-workers",
        "Join only secure sums of at least so many devices: this one and neighbours whose keys it has checked.",
    ),
    _limit(
        "--secure-ca",
        "Authorities (PEM) of the other devices in secure sums; without: those of the link.",
        type=FILE,
    ),
    _limit(
        "--secure-crl",
        "Those authorities' list of revoked certificates (PEM), read for each secure sum.",
        type=FILE,
    ),
    _limit(
        "--only-when",
        "Ask for tasks only while this is so, as in 'on_mains and idle' (docs/guide/operate.md).",
        metavar="EXPRESSION",
    ),
    _life("--spool-max-updates", "Most unsent updates to keep."),
    _life("--spool-max", "Most bytes of unsent updates to keep.", name="spool_max_bytes", type=SIZE),
    _life(
        "--spool-keep",
        "Keep unsent updates of another run for this long, in case its aggregator comes back.",
        name="spool_keep_s",
        type=DURATION,
    ),
    *client_settings(),
    *LOGS,
]


def settings_from(values: Mapping[str, Any]) -> WorkerSettings:
    """Build the settings from the values of the command line. Raises `UsageError`."""
    load_encodings()
    name = values["name"] or socket.gethostname()
    serve_tls = Tls(None, values["serve_tls_cert"], values["serve_tls_key"])
    more = {
        "name": name,
        "state_dir": values["state_dir"] or _default_state_dir(name),
        "role": _ROLES[values["role"]],
        "device": _profile_overrides(values),
        "tls": client_tls(values),
        "join": join_token(values["join"]),
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
        return encoding_names()
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _default_state_dir(name: str) -> Path:
    try:
        root = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    except RuntimeError:
        raise UsageError("this user has no home folder: name a folder for the state with --state-dir") from None
    return Path(root) / "fedgrpc" / name


def _profile_overrides(values: Mapping[str, Any]) -> dict[str, Any]:
    overrides: dict[str, Any] = {}
    if values["device_class"] is not None:
        overrides["device_class"] = values["device_class"]
    if values["labels"]:
        overrides["labels"] = dict(values["labels"])
    kinds = typing.get_type_hints(DeviceProfile)
    for name, text in values["profile"]:
        if name == "labels":
            raise UsageError("labels are given with --label NAME=VALUE")
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


def builder_from(values: Mapping[str, Any], own_task: str | type | None) -> BuildTrainer:
    """Return what builds the trainer of a run: of `own_task`, or of the run's. Raises `UsageError`.

    Mistakes are reported before the worker dials its aggregator.
    """
    setup = pick(TaskSetup, values, options=dict(values["options"]))
    if (threads := setup.threads or usual_threads()) is not None:
        use_threads(threads)
    if not all(pattern.strip() for pattern in values["allow_tasks"]):
        raise UsageError("--allow-task must name a task or a pattern, as in mine.tasks.*, not an empty text")
    if own_task is not None:
        find_task(own_task)
    if setup.partition is not None and setup.part is not None:
        parse_partition(setup.partition)
        parse_part(setup.part)
    own = (reference_of(own_task),) if own_task is not None else ALLOWED_TASKS
    allowed = values["allow_tasks"] or own

    def build(registration: Registration) -> Trainer:
        return trainer_for(setup, own_task, registration, allowed)

    return build


def _run(**values: Any) -> int:
    begin(values)
    settings = settings_from(values)
    return asyncio.run(run_worker(settings, build_trainer=builder_from(values, values["task"])))


COMMAND = SettingsCommand(
    "worker",
    _run,
    SETTINGS,
    "Work for an aggregator: train on this device's data, and send updates, never the data.",
)
