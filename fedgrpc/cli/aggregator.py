"""`fedgrpc aggregator`: every setting of an aggregator, and the call that runs it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from fedgrpc.aggregation.server_optimizer import OPTIMIZERS
from fedgrpc.aggregator.server import run_aggregator
from fedgrpc.aggregator.settings import AggregatorSettings, Target
from fedgrpc.cli.connection import FILE, server_tls, tls_settings
from fedgrpc.cli.logs import LOGS, configure_logs
from fedgrpc.cli.options import Declare, Setting, SettingsCommand, pick
from fedgrpc.cli.value_types import DURATION, SIZE, NamedValues
from fedgrpc.errors import UsageError
from fedgrpc.hierarchy.process import run_leaf
from fedgrpc.metrics import Metrics, serve_metrics
from fedgrpc.process import collect_rarely, keep_private
from fedgrpc.protocol.tasks import Role
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.rounds.selection import SelectionPolicy
from fedgrpc.rpc.address import Address
from fedgrpc.rpc.channel import Tls
from fedgrpc.submodels.plan import PlanTable
from fedgrpc.training_plan import TrainingPlan
from fedgrpc.worker.settings import WorkerSettings

_place = Declare("Where", AggregatorSettings)
_model = Declare("The model", AggregatorSettings)
_policy = Declare("Rounds", RoundPolicy)
_choosing = Declare("Rounds", SelectionPolicy)
_end = Declare("When the run ends", AggregatorSettings)
_plan = Declare("What workers are asked to do (without: as their learning task does)", TrainingPlan)
_mean = Declare("Averaging", AggregatorSettings)
_transfer = Declare("Transfer", AggregatorSettings)
_service = Declare("Service", AggregatorSettings)
_upstream = Declare("Past one machine (docs/tree.md)")
_tls = Declare("TLS", AggregatorSettings)
_RECIPE = AggregatorSettings.upload_recipe
_ONE_WAY: dict[str, Any] = {"default": None, "metavar": "RECIPES", "show_default": "as --encoding"}

SETTINGS: list[Setting] = [
    _place(
        "--data-dir",
        "Folder of rounds, updates and models; a restart goes on from it.",
        type=click.Path(path_type=Path, file_okay=False),
        required=True,
    ),
    _place("--address", "HOST:PORT to listen on; 0.0.0.0:50051 for every network.", metavar="HOST:PORT"),
    _place("--run-name", "Name of the run.", metavar="NAME"),
    _place(
        "--port-file",
        "File to write the port to once workers are served, for an address with port 0.",
        type=click.Path(path_type=Path, dir_okay=False),
    ),
    _place("--metrics-address", "HOST:PORT to serve Prometheus metrics on.", metavar="HOST:PORT"),
    _model("--task", "Learning task for workers started without one.", name="learning_task", metavar="REF"),
    _model("--model", "Model name for workers started without one.", metavar="NAME"),
    _model("--initial-model", "Safetensors file to start from; without: a worker's untrained model.", type=FILE),
    _model(
        "--max-model", "Largest model that a worker may give as the first one.", name="max_model_bytes", type=SIZE
    ),
    _model(
        "--initialiser",
        "Workers of this name (with * and ?) give the untrained model; repeat for each. Without: who comes first.",
        name="initialisers",
        multiple=True,
        default=(),
        metavar="NAME",
    ),
    _policy("--min-workers", "A round opens once this many workers are idle."),
    _policy("--min-sample-size", "Aim at no fewer updates than this."),
    _policy("--max-participants", "Aim at no more updates than this."),
    _policy("--fraction", "Part of the live workers to aim at."),
    _policy("--over-selection", "Ask this many times as many as are aimed at."),
    _policy("--quorum", "At the deadline, commit with at least this many updates."),
    _policy("--weight-aim", "Commit early once a quorum of updates weighs this much: examples, or --weight."),
    _policy("--deadline", "A round's time to report.", name="deadline_s", type=DURATION),
    _choosing(
        "--learn-deadline/--no-learn-deadline",
        "Shorten it to what the wanted updates are expected to need, by each worker's own past times.",
    ),
    _policy("--deadline-floor", "A learned deadline is no shorter.", name="deadline_floor_s", type=DURATION),
    _choosing("--deadline-quantile", "How sure to be of each worker: this quantile of its own times."),
    _choosing("--deadline-margin", "Give this many times what is expected."),
    _choosing("--selection", "Choose workers by lot, or by usefulness and speed (Oort)."),
    _choosing("--fairness", "Oort: share of seats for those who have waited longest."),
    _choosing("--exploration", "Oort: share of workers never tried among the others, in the first round."),
    _policy("--late", "What is late is discarded, or carried into the next round and counts less there."),
    _policy("--max-staleness", "Carry an update on until this many versions have been committed meanwhile."),
    _policy(
        "--buffer-size",
        "With --late carry: every so many updates make a version, of whatever age (FedBuff).",
    ),
    _policy(
        "--reconnect-grace",
        "After a restart of the aggregator the open round lasts at least this much longer.",
        name="reconnect_grace_s",
        type=DURATION,
    ),
    _policy("--lease", "A worker silent for this long has lost its task.", name="lease_s", type=DURATION),
    _policy(
        "--selection-window",
        "Wait this much longer for the other live workers.",
        name="selection_window_s",
        type=DURATION,
    ),
    _policy(
        "--selection-timeout",
        "Abandon a round that finds too few workers for this long; without: wait.",
        name="selection_timeout_s",
        type=DURATION,
    ),
    _end("--rounds", "Commit this many rounds."),
    _end("--target-metric", "End early, as in accuracy>=0.95.", name="target", type=str, metavar="METRIC>=VALUE"),
    _end("--stay/--no-stay", "Go on serving the model after the run has ended."),
    _plan("--epochs", "Passes over the local data; fractions are allowed."),
    _plan("--max-steps", "At most this many optimizer steps."),
    _plan("--batch-size", "Examples in a batch."),
    _plan("--learning-rate", "Step size of the workers' optimizer."),
    _plan("--momentum", "Momentum of the workers' optimizer."),
    _plan("--weight-decay", "Weight decay of the workers' optimizer (L2 penalty); 0: none."),
    _plan("--proximal-mu", "FedProx's pull towards the global model; 0: FedAvg."),
    _plan(
        "--label-adjustment",
        "Add this many times the log of each label's share on a worker to its logits in training; 0: do not "
        "(docs/heterogeneity.md).",
    ),
    _plan(
        "--upload-reserve",
        "Train no longer than until this much (or what a worker's uploads have taken) is left of the deadline; "
        "without: all of the work.",
        name="upload_reserve_s",
        type=DURATION,
    ),
    _plan(
        "--local-models",
        "TOML file of local-model plans by device class (docs/heterogeneity.md).",
        type=FILE,
        metavar="FILE",
    ),
    _mean(
        "--weight",
        "Weight of a worker in the mean instead of its example count; repeat for each. Others keep their counts.",
        name="worker_weights",
        type=NamedValues(number=True),
        multiple=True,
        default=(),
        metavar="WORKER=P",
    ),
    _mean(
        "--normalize-steps/--no-normalize-steps",
        "Each update counts by its direction, not by its steps (FedNova); --momentum must be what workers use.",
    ),
    _mean(
        "--precision-weights/--plain-weights",
        "An update's say in a coordinate also falls with the noise that its local model's number format adds.",
    ),
    _mean("--staleness-exponent", "An update that is N versions late counts (1 + N) to the minus this."),
    _mean("--server-optimizer", "What to make of the mean.", type=click.Choice(list(OPTIMIZERS))),
    _mean("--server-learning-rate", "Its step size; without: its usual one."),
    _mean("--max-update-norm", "Refuse updates whose L2 norm is above this."),
    _mean("--clip-norm", "Scale updates down to this L2 norm (of the difference to the version they began from)."),
    _mean("--max-examples", "An update weighs no more examples than this, whatever it says."),
    _policy(
        "--max-share",
        "No worker has a larger share of a mean, as in 0.2; with fewer than 1 / SHARE all weigh the same.",
    ),
    _mean(
        "--evaluator",
        "Workers of this name (with * and ?) may be evaluators; repeat for each. Without: anyone may, but what "
        "they say ends no run.",
        name="evaluators",
        multiple=True,
        default=(),
        metavar="NAME",
    ),
    _mean(
        "--leaf",
        "Workers of this name (with * and ?) may be aggregators, and their means count for all their workers; "
        "repeat for each. Without: anyone may, but a mean weighs no more than a worker's update could.",
        name="leaves",
        multiple=True,
        default=(),
        metavar="NAME",
    ),
    _mean("--evaluate/--no-evaluate", "Workers score the model they are given on their held-out data."),
    _mean("--seed", "Of selection, shuffling and stochastic rounding."),
    _transfer(
        "--encoding",
        "Both ways, as in raw or int8+zstd; by link, as in 'raw above 1gbit | int8+zstd | raw', or auto "
        "(docs/transport.md).",
        default=_RECIPE,
        metavar="RECIPES",
    ),
    _transfer("--upload-encoding", "Of updates.", name="upload_recipe", **_ONE_WAY),
    _transfer("--download-encoding", "Of models.", name="download_recipe", **_ONE_WAY),
    _transfer(
        "--difference-encoding",
        "Of the difference to the model that a worker holds, where it is lossy.",
        name="difference_recipe",
        metavar="RECIPES",
        show_default="as models",
    ),
    _transfer("--max-chunk", "Largest piece of a stream.", name="max_chunk_bytes", type=SIZE),
    _transfer("--max-payload", "Largest update that is taken.", name="max_payload_bytes", type=SIZE),
    _transfer("--max-uploads", "Uploads at the same time."),
    _transfer(
        "--max-upload-memory",
        "Bytes of uploads on their way to the disk.",
        name="max_upload_memory_bytes",
        type=SIZE,
    ),
    _transfer("--durable/--no-durable", "Acknowledge an update once it is on the disk."),
    _service("--max-workers", "Registered workers."),
    _service("--keep-versions", "Model versions to keep on the disk."),
    _service("--keep-rounds", "Records of past rounds to keep: one of 1,000 tasks takes about 180 kB."),
    _service("--poll-wait", "How long a worker's poll may wait.", name="poll_wait_s", type=DURATION),
    _service(
        "--heartbeat-interval",
        "How often a busy worker reports; without: a third of the lease, 5 s at most.",
        name="heartbeat_interval_s",
        type=DURATION,
    ),
    _service("--drain", "How long SIGTERM waits for calls in flight.", name="drain_s", type=DURATION),
    _upstream("--upstream", "Aggregator to work for, with the workers of this one.", metavar="HOST:PORT"),
    _upstream(
        "--upstream-name", "Name there, unique in its fleet; without: this machine's host name.", metavar="NAME"
    ),
    _upstream(
        "--upstream-tls", "Use TLS with the certificates that the system trusts.", is_flag=True, default=False
    ),
    _upstream("--upstream-tls-ca", "Certificates to trust there (PEM); turns TLS on.", type=FILE),
    _upstream("--upstream-tls-cert", "This side's certificate (PEM), where the parent asks for one.", type=FILE),
    _upstream("--upstream-tls-key", "Key of that certificate (PEM).", type=FILE),
    *tls_settings("Certificate to serve with (PEM).", "Ask workers for certificates signed by these (PEM)."),
    _tls(
        "--certificate-names/--no-certificate-names",
        "A worker acts under a name of its certificate alone: its common name, or a subject alternative one.",
    ),
    _tls(
        "--operator",
        "Certificates of this name may pause, resume and stop the run; repeat for each; without: all may.",
        name="operators",
        multiple=True,
        default=(),
        metavar="NAME",
    ),
    *LOGS,
]


def settings_from(values: dict[str, Any]) -> AggregatorSettings:
    """The settings that these values of the command line stand for. Raises `UsageError`."""
    both = values["encoding"]
    return pick(
        AggregatorSettings,
        values,
        policy=pick(RoundPolicy, values),
        choosing=pick(SelectionPolicy, values),
        plan=pick(TrainingPlan, values),
        local_models=_plans(values["local_models"]),
        worker_weights=dict(values["worker_weights"]),
        target=None if values["target"] is None else Target.parse(values["target"]),
        upload_recipe=values["upload_recipe"] or both,
        download_recipe=values["download_recipe"] or both,
        tls=server_tls(values),
    )


def upstream_from(values: Mapping[str, Any], data_dir: Path) -> WorkerSettings | None:
    """Return the settings of this aggregator as a worker of its parent; None without one. Raises `UsageError`."""
    files = Tls(values["upstream_tls_ca"], values["upstream_tls_cert"], values["upstream_tls_key"])
    wants_tls = values["upstream_tls"] or files != Tls()
    if values["upstream"] is None:
        if wants_tls or values["upstream_name"] is not None:
            raise UsageError("the --upstream-... settings go with --upstream HOST:PORT")
        return None
    return WorkerSettings(
        name=values["upstream_name"] or socket.gethostname(),
        aggregator=values["upstream"],
        state_dir=data_dir / "upstream",
        role=Role.AGGREGATOR,
        tls=files if wants_tls else None,
        serve_address=None,
    )


def _plans(path: Path | None) -> PlanTable:
    if path is None:
        return PlanTable()
    try:
        return PlanTable.from_toml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def _run(**values: Any) -> int:
    keep_private()
    configure_logs(values)
    settings = settings_from(values)
    Address.parse(settings.address)
    metrics = Metrics()
    collect_rarely()
    with ExitStack() as stack:
        if values["metrics_address"] is not None:
            stack.enter_context(serve_metrics(metrics, values["metrics_address"]))
        if values["port_file"] is not None and Address.parse(settings.address).is_unix:
            raise UsageError("--port-file goes with an --address that has a port, not with a unix socket")
        ready = _port_writer(values["port_file"])
        upstream = upstream_from(values, settings.data_dir)
        if upstream is not None:
            return asyncio.run(run_leaf(settings, upstream, ready=ready, metrics=metrics))
        return asyncio.run(run_aggregator(settings, ready=ready, metrics=metrics))


def _port_writer(path: Path | None) -> Callable[[int], None] | None:
    return None if path is None else lambda port: _write_port(path, port)


def _write_port(path: Path, port: int) -> None:
    try:
        path.write_text(f"{port}\n")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


COMMAND = SettingsCommand(
    "aggregator",
    _run,
    SETTINGS,
    "Lead a run: hand out tasks, take updates in, average them, keep every model version.",
)
