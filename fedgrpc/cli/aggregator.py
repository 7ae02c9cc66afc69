"""`fedgrpc aggregator`: the start of an aggregator, by its settings of `fedgrpc.cli.aggregator_settings`."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click

from fedgrpc.aggregator.run_files import Texts, holds_run
from fedgrpc.aggregator.server import Aggregator, Hosting, run_aggregator
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.cli.aggregator_settings import PROCESS_NAMES, SETTINGS
from fedgrpc.cli.beside import beside_of
from fedgrpc.cli.options import SettingsCommand, pick
from fedgrpc.cli.process import begin, join_token, server_tls
from fedgrpc.cli.run import submitted
from fedgrpc.cli.values import read_file
from fedgrpc.codec.encoding import load_encodings
from fedgrpc.errors import UsageError
from fedgrpc.gauges import Gauges
from fedgrpc.hierarchy.process import run_leaf
from fedgrpc.metrics import ProcessMetrics, serve_metrics
from fedgrpc.privacy.policy import PrivacyPolicy
from fedgrpc.privacy.secure_policy import SecurePolicy
from fedgrpc.process import collect_rarely
from fedgrpc.protocol.tasks import WorkerRole
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.rounds.selection import SelectionPolicy
from fedgrpc.rpc.address import Address, dialled
from fedgrpc.rpc.channel import Tls
from fedgrpc.rpc.fence import within_reach
from fedgrpc.runs.conditions import Condition
from fedgrpc.submodels.plan_table import PlanTable
from fedgrpc.training_plan import TrainingPlan
from fedgrpc.worker.settings import WorkerSettings


def settings_from(values: dict[str, Any]) -> AggregatorSettings:
    """Build the settings from the values of the command line. Raises `UsageError`."""
    load_encodings()
    both, plans = values["encoding"], values["local_models"]
    return pick(
        AggregatorSettings,
        values,
        policy=pick(RoundPolicy, values),
        choosing=pick(SelectionPolicy, values),
        privacy=pick(PrivacyPolicy, values),
        secure=pick(SecurePolicy, values),
        plan=pick(TrainingPlan, values),
        local_models=PlanTable() if plans is None else read_file(plans, PlanTable.from_toml),
        worker_weights=dict(values["worker_weights"]),
        task_options=dict(values["task_options"]),
        target=None if values["target"] is None else Condition.parse(values["target"]),
        upload_recipe=values["upload_recipe"] or both,
        download_recipe=values["download_recipe"] or both,
        tls=server_tls(values),
    )


def upstream_from(values: Mapping[str, Any], data_dir: Path) -> WorkerSettings | None:
    """Return the settings of this aggregator as a worker of its parent; None without one. Raises `UsageError`."""
    files = Tls(values["upstream_tls_ca"], values["upstream_tls_cert"], values["upstream_tls_key"])
    wants_tls = values["upstream_tls"] or files != Tls()
    if values["upstream"] is None:
        if wants_tls or values["upstream_name"] is not None or values["upstream_join"] is not None:
            raise UsageError("the --upstream-... settings go with --upstream HOST:PORT")
        return None
    return WorkerSettings(
        name=values["upstream_name"] or socket.gethostname(),
        aggregator=values["upstream"],
        state_dir=data_dir / "upstream",
        role=WorkerRole.AGGREGATOR,
        tls=files if wants_tls else None,
        join=join_token(values["upstream_join"]),
        serve_address=None,
    )


@contextmanager
def prepared(values: Mapping[str, Any], settings: AggregatorSettings, has_own: bool) -> Iterator[Aggregator]:
    """Yield an aggregator that is ready to run, with its metrics, its page and all that takes further runs.

    `has_own`: it has a run of its own settings. Raises `UsageError`.
    """
    metrics = ProcessMetrics()
    with ExitStack() as stack:
        gauges = _served(stack, metrics, values["metrics_address"])
        beside = beside_of(values, settings, gauges)
        hosting = Hosting(has_own, partial(run_settings, values), run_texts)
        yield Aggregator(settings, metrics, beside=beside, hosting=hosting)


def _served(stack: ExitStack, metrics: ProcessMetrics, address: str | None) -> Gauges | None:
    """Serve the metrics where that is wanted, and return their gauges."""
    if address is None:
        return None
    stack.enter_context(serve_metrics(metrics, address))
    return Gauges(metrics.registry)


def _run(**values: Any) -> int:
    begin(values)
    settings = settings_from(values)
    address = Address.parse(settings.address)
    if values["port_file"] is not None and address.is_unix:
        raise UsageError("--port-file needs an --address with a port; a unix socket has none")
    ready = _port_writer(values["port_file"])
    upstream = upstream_from(values, settings.data_dir)
    collect_rarely()
    if upstream is not None:
        return _run_leaf(values, settings, upstream, ready)
    with prepared(values, settings, _has_own(settings)) as aggregator:
        return _fenced(values, run_aggregator(aggregator, ready=ready))


def _run_leaf(
    values: Mapping[str, Any],
    settings: AggregatorSettings,
    upstream: WorkerSettings,
    ready: Callable[[int], None] | None,
) -> int:
    if values["web_address"] is not None:
        raise UsageError("--web-address is for the parent: the page of a leaf would show a part of each round")
    metrics = ProcessMetrics()
    with ExitStack() as stack:
        _served(stack, metrics, values["metrics_address"])
        return _fenced(values, run_leaf(settings, upstream, ready=ready, metrics=metrics))


def _fenced(values: Mapping[str, Any], work: Coroutine[Any, Any, int]) -> int:
    """Run the aggregator, if there is a witness only while that can be reached."""
    if values["witness"] is None:
        return asyncio.run(work)
    witness = dialled(values["witness"])
    if witness.is_unix or not values["witness_after_s"] > 0:
        work.close()
        raise UsageError("--witness is HOST:PORT on another machine, and --witness-after above 0")
    return asyncio.run(within_reach(witness, values["witness_after_s"], work))


def _has_own(settings: AggregatorSettings) -> bool:
    """Return whether the aggregator has a run of its own: it is given a setting of one, or has begun one."""
    context = click.get_current_context()
    of_runs = (each for each in COMMAND.settings() if each.name not in PROCESS_NAMES or each.name == "run_name")
    return any(each.origin(context) for each in of_runs) or holds_run(settings.data_dir)


def run_settings(process: Mapping[str, Any], name: str, folder: Path, texts: Texts) -> AggregatorSettings:
    """Return the settings of a submitted run, with those of the process beside. Raises `UsageError`."""
    keys = {setting.key for setting in COMMAND.settings() if setting.name in PROCESS_NAMES}
    if wrong := sorted(keys.intersection(texts)):
        raise UsageError(f"{', '.join(wrong)} is for the aggregator's start, and of no single run")
    given = {setting: value for setting, value in process.items() if setting in PROCESS_NAMES}
    table = {key: list(values) if len(values) != 1 else values[0] for key, values in texts.items()}
    try:
        return settings_from(COMMAND.values_of(table, {**given, "data_dir": folder, "run_name": name}))
    except UsageError as error:
        table_name = f"[{COMMAND.name}] "
        raise UsageError(str(error).replace(f"{table_name}has", "a run has").replace(table_name, "")) from error


def run_texts(path: Path) -> dict[str, list[str]]:
    """Return the settings in the file of a submitted run. Raises `UsageError`."""
    return submitted(path)[1]


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
    "Lead a run: hand out tasks, collect and average updates, keep model versions.",
)
