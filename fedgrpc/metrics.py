"""Metrics for Prometheus. Names and help texts are in one place. Code that counts holds the `Metrics` object.

The rule: nothing is global. Every run's `Metrics` has a registry of its own, so two aggregators in one process, as
in the tests, do not add up. `ProcessMetrics` shows those of all runs of an aggregator, each sample with its run.
Labels take few values: no worker names, a fleet has thousands.
"""

from __future__ import annotations

import threading
from collections import Counter as Counted
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from socketserver import ThreadingMixIn
from typing import Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
    make_wsgi_app,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from fedgrpc import __version__, claims
from fedgrpc.errors import UsageError
from fedgrpc.process import keep_from_children
from fedgrpc.protocol.records import prediction_errors
from fedgrpc.rounds.events import LossCause
from fedgrpc.rpc.address import Address
from fedgrpc.rpc.ingest import IngestProcesses
from fedgrpc.v1.round_pb2 import Jump, Round, RoundPhase, TaskPhase, TaskRecord

# They double the page and say nothing that a restart of the process does not.
disable_created_metrics()  # type: ignore[no-untyped-call]

# From a round of digits on loopback to one of a large model over a radio link, seconds.
_BUCKETS_S: Final = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1800, 3600)
_BUCKETS_BYTES: Final = tuple(1 << power for power in range(20, 37, 2))
_BUCKETS_RATIO: Final = (0.03, 0.1, 0.3, 1, 3, 10)
_OUTCOMES: Final = {
    TaskPhase.TASK_PHASE_ACCEPTED: "accepted",
    TaskPhase.TASK_PHASE_REJECTED: "rejected",
    TaskPhase.TASK_PHASE_FAILED: "failed",
    TaskPhase.TASK_PHASE_EXPIRED: "expired",
    TaskPhase.TASK_PHASE_LATE: "late",
}
_LOCAL: Final = "local_"


class Metrics:
    """The metrics of one run: set the gauges as things change, and hand over every ended round."""

    def __init__(self, live_workers: Gauge | None = None) -> None:
        """`live_workers` is the gauge of the whole fleet, which runs share; None: one of its own."""
        self.registry = registry = CollectorRegistry()
        self.rounds = Counter("fedgrpc_rounds", "Rounds that have ended", ["outcome"], registry=registry)
        self.tasks = Counter(
            "fedgrpc_tasks", "Tasks of ended rounds, by how they ended", ["outcome"], registry=registry
        )
        self.task_endings = Counter(
            "fedgrpc_task_endings",
            "The same, with the lost ones split by what they were too slow in",
            ["ending"],
            registry=registry,
        )
        self.payload_bytes = Counter(
            "fedgrpc_payload_bytes", "Payload bytes of ended rounds", ["direction"], registry=registry
        )
        self.round_seconds = Histogram(
            "fedgrpc_round_seconds", "From opening to end", buckets=_BUCKETS_S, registry=registry
        )
        self.phase_seconds = Histogram(
            "fedgrpc_phase_seconds",
            "Where an accepted task's time went: download, local, upload and global",
            ["phase"],
            buckets=_BUCKETS_S,
            registry=registry,
        )
        self.task_memory_bytes = Histogram(
            "fedgrpc_task_memory_bytes",
            "Of accepted tasks at their most: resident memory of the worker's process, and tensors",
            ["kind"],
            buckets=_BUCKETS_BYTES,
            registry=registry,
        )
        self.prediction_errors = Histogram(
            "fedgrpc_prediction_error_ratio",
            "Of accepted tasks: how far the predicted cost was off, as a part of what was measured",
            ["part"],
            buckets=_BUCKETS_RATIO,
            registry=registry,
        )
        self._scored: dict[str, frozenset[str]] = {}
        self.scores = Gauge(
            "fedgrpc_score",
            "Means over held-out examples: of the latest version that workers or evaluators have scored, and of "
            "the local models that workers made of it",
            ["metric", "of"],
            registry=registry,
        )
        self.scores_not_finite = Counter(
            "fedgrpc_scores_not_finite",
            "Scores of versions that are NaN or infinite on some device",
            registry=registry,
        )
        self.jumps = Counter(
            "fedgrpc_jumps",
            "Versions that are far from all before: their norm, or their scores",
            ["of"],
            registry=registry,
        )
        self.live_workers = live_workers or _live_workers(registry)
        self.model_version = Gauge("fedgrpc_model_version", "Latest committed model version", registry=registry)
        self.current_round = Gauge("fedgrpc_current_round", "Number of the latest round", registry=registry)
        for of in ("norm", "scores"):
            self.jumps.labels(of)
        for outcome in ("committed", "abandoned"):
            self.rounds.labels(outcome)
        for outcome in _OUTCOMES.values():
            self.tasks.labels(outcome)
            self.task_endings.labels(outcome)
        for cause in LossCause:
            self.task_endings.labels(cause.label)

    def observe_round(self, record: Round) -> None:
        """Count a round that has ended, once: its outcome, tasks, bytes and times."""
        committed = record.phase == RoundPhase.ROUND_PHASE_COMMITTED
        self.rounds.labels("committed" if committed else "abandoned").inc()
        self.round_seconds.observe(record.duration_seconds)
        self.current_round.set(record.number)
        if record.jump == Jump.JUMP_NORM:
            self.jumps.labels("norm").inc()
        local = {name: value for name, value in record.training_metrics.items() if name.startswith(_LOCAL)}
        self.observe_scores({name.removeprefix(_LOCAL): value for name, value in local.items()}, "local")
        self.payload_bytes.labels("download").inc(sum(task.download_bytes for task in record.tasks))
        self.payload_bytes.labels("upload").inc(sum(task.upload_bytes for task in record.tasks))
        # A label takes longer to look up than all else of a task.
        for (phase, cause), count in Counted((task.phase, task.loss_cause) for task in record.tasks).items():
            if phase in _OUTCOMES:
                self.tasks.labels(_OUTCOMES[phase]).inc(count)
                self.task_endings.labels(LossCause(cause).label if cause else _OUTCOMES[phase]).inc(count)
        accepted = [task for task in record.tasks if task.phase == TaskPhase.TASK_PHASE_ACCEPTED]
        if accepted:
            for name in ("download", "local", "upload", "global"):
                seconds = self.phase_seconds.labels(name)
                for task in accepted:
                    seconds.observe(getattr(task.timings, f"{name}_seconds"))
        for task in accepted:
            self._observe_memory(task)

    def restore(self, version: int, records: Sequence[Round]) -> None:
        """Show what a former process knew: version, latest round, scores; `records` are newest first."""
        self.model_version.set(version)
        if records:
            self.current_round.set(records[0].number)
        for of, scores in (("global", "metrics"), ("evaluator", "evaluator_metrics")):
            self.observe_scores(next(filter(None, (getattr(record, scores) for record in records)), {}), of)

    def observe_scores(self, metrics: Mapping[str, float], of: str) -> None:
        """Show the latest means in place of the former; `of` is "global" (by workers), "evaluator" or "local".

        Names of scores are the workers' word: those that nobody reports any more make room.
        """
        if not metrics:
            return
        shown = dict(islice(sorted(metrics.items()), claims.METRICS))
        for metric in self._scored.get(of, frozenset()) - shown.keys():
            self.scores.remove(metric, of)
        self._scored[of] = frozenset(shown)
        for metric, value in shown.items():
            self.scores.labels(metric, of).set(value)

    def _observe_memory(self, task: TaskRecord) -> None:
        for kind, size_bytes in (("resident", task.peak_memory_bytes), ("tensors", task.tensor_bytes)):
            if size_bytes:
                self.task_memory_bytes.labels(kind).observe(size_bytes)
        if task.HasField("prediction"):
            for part, error in prediction_errors(task).items():
                self.prediction_errors.labels(part).observe(abs(error))


def _live_workers(registry: CollectorRegistry) -> Gauge:
    return Gauge("fedgrpc_live_workers", "Workers heard of within a lease", registry=registry)


# Name, description, and what it shows of `IngestProcesses`: where there are some.
INGEST_GAUGES: Final = (
    ("fedgrpc_ingest_processes", "Ingest processes that accept connections", "serving_count"),
    ("fedgrpc_ingest_restarts", "Ingest processes that died or hung and were started again", "restarts"),
    ("fedgrpc_ingest_memory_bytes", "Resident memory of all ingest processes", "memory_bytes"),
    ("fedgrpc_ingest_cpu_seconds", "CPU time of the ingest processes that run now", "cpu_s"),
)


class ProcessMetrics(Collector):
    """The metrics of an aggregator: of its process, and of each of its runs, with the label `run`."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        Info("fedgrpc_build", "Version of this program", registry=registry).info({"version": __version__})
        self._live_workers = _live_workers(registry)
        self._runs: dict[str, Metrics] = {}
        self._ingest: IngestProcesses | None = None
        registry.register(self)

    def show_ingest(self, processes: IngestProcesses | None) -> None:
        """Show the ingest processes of the aggregator's server, if it has some."""
        first, self._ingest = self._ingest is None, processes
        if processes is None or not first:
            return
        for name, text, of in INGEST_GAUGES:
            Gauge(name, text, registry=self.registry).set_function(partial(self._ingest_figure, of))

    def _ingest_figure(self, name: str) -> float:
        return float(getattr(self._ingest, name, 0))

    def of(self, run: str) -> Metrics:
        """Return the metrics of a run. A run that is closed and opened again counts on."""
        if run not in self._runs:
            self._runs[run] = Metrics(self._live_workers)
        return self._runs[run]

    def drop(self, run: str) -> None:
        """Show nothing more of a run, which is removed."""
        self._runs.pop(run, None)

    def collect(self) -> Iterable[Metric]:
        """Return the metrics of all runs; Prometheus wants all samples of a name together. Any thread may call."""
        families: dict[str, Metric] = {}
        for run, metrics in tuple(self._runs.items()):
            for family in metrics.registry.collect():
                whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                whole.samples += [each._replace(labels={**each.labels, "run": run}) for each in family.samples]
        return families.values()


@contextmanager
def serve_metrics(metrics: Metrics | ProcessMetrics, address: str) -> Iterator[int]:
    """Serve `http://address/metrics` in a thread while the block lasts; yields the port ("HOST:0" takes one).

    Raises:
        UsageError: the address is malformed or in use.
    """
    where = Address.parse(address)
    if where.is_unix:
        raise UsageError(f"metrics are served at HOST:PORT, as in 127.0.0.1:9090, not on {address}")
    try:
        server = _server_at(where)
    except OSError as error:
        raise UsageError(f"cannot serve metrics on {address}: {error.strerror or error}") from error
    server.set_app(make_wsgi_app(metrics.registry))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    keep_from_children(server.server_port)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _MetricsServer(ThreadingMixIn, WSGIServer):
    """Answers each scrape in a thread of its own."""

    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        """Scrapes are no news."""


def _server_at(address: Address) -> _MetricsServer:
    """A server that listens. Raises OSError. The whole socket address is used: it says which zone is meant."""
    family, where = address.resolve(listening=True)[0]
    kind = type("_Server", (_MetricsServer,), {"address_family": family})
    server: _MetricsServer = kind(where, _Quiet)
    return server
