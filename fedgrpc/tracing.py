"""Traces of rounds for OpenTelemetry (extra `fedgrpc[otel]`): one trace a round, over aggregator and workers.

The rule: the ids of a round and of a task follow from the run, the round's number and the task's token, which both
sides know. So nobody has to hand them out, a restart changes none, and spans of both sides meet in one trace:

    round                              aggregator
    ├── commit                         aggregator
    └── task                           worker
        ├── download, local, upload    worker
        └── Aggregator/PushUpdate ...  aggregator, by the traceparent (W3C Trace Context) of the call's metadata

Without `begin` nothing is imported, and every function here does nothing.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Final

from fedgrpc.errors import ExtraMissing, UsageError
from fedgrpc.v1.device_pb2 import Timings
from fedgrpc.v1.round_pb2 import Round, RoundPhase, TaskPhase

TRACEPARENT: Final = "traceparent"
# https://www.w3.org/TR/trace-context/#traceparent-header-field-values, version 00.
_PARENT: Final = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")
_SAMPLED: Final = 1
_NEXT_IDS: ContextVar[tuple[int, int] | None] = ContextVar("next_ids", default=None)
_tracer: Any = None


def begin(service: str, processor: Any) -> Any:
    """Send spans to `processor`, as those of `service`. Returns the provider. Raises `UsageError`."""
    global _tracer
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import RandomIdGenerator, TracerProvider
    except ImportError as error:
        raise ExtraMissing.of("OTEL_TRACES_EXPORTER", "otel", error) from error

    class Ids(RandomIdGenerator):  # type: ignore[misc]
        """Ids that follow from a round or a task where they have to, else random ones."""

        def generate_trace_id(self) -> int:
            known = _NEXT_IDS.get()
            return super().generate_trace_id() if known is None else known[0]

        def generate_span_id(self) -> int:
            known = _NEXT_IDS.get()
            return super().generate_span_id() if known is None else known[1]

    provider = TracerProvider(resource=Resource.create({"service.name": service}), id_generator=Ids())
    provider.add_span_processor(processor)
    _tracer = provider.get_tracer("fedgrpc")
    return provider


def begin_by_environment(service: str, environment: Mapping[str, str]) -> None:
    """Begin as OTEL_TRACES_EXPORTER says: otlp, console or none. Raises `UsageError`."""
    kind = environment.get("OTEL_TRACES_EXPORTER", "none")
    if kind in ("none", ""):
        return
    try:
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter

        if kind == "console":
            begin(service, BatchSpanProcessor(ConsoleSpanExporter()))
            return
        if kind == "otlp":
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            begin(service, BatchSpanProcessor(OTLPSpanExporter()))
            return
    except ImportError as error:
        raise ExtraMissing.of(f"OTEL_TRACES_EXPORTER={kind}", "otel", error) from error
    raise UsageError(f"OTEL_TRACES_EXPORTER must be otlp, console or none, not {kind!r}")


def end() -> None:
    """Send no more spans."""
    global _tracer
    _tracer = None


def _ids(text: str) -> tuple[int, int]:
    """Return a trace id and a span id that follow from a text; neither is 0, which means none."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:16]) or 1, int.from_bytes(digest[16:24]) or 1


def round_ids(run_id: str, number: int) -> tuple[int, int]:
    """Return the trace id of a round, and the id of its span."""
    return _ids(f"{run_id}/{number}")


def traceparent(run_id: str, number: int, token: str) -> str:
    """Return the traceparent of calls about a task: its round's trace, and the task's span."""
    return f"00-{round_ids(run_id, number)[0]:032x}-{_ids(token)[1]:016x}-01"


def _below(trace_id: int, span_id: int) -> Any:
    """Return the context in which spans are children of one of another process."""
    from opentelemetry import trace

    parent = trace.SpanContext(trace_id, span_id, is_remote=True, trace_flags=trace.TraceFlags(_SAMPLED))
    return trace.set_span_in_context(trace.NonRecordingSpan(parent))


def _span(
    name: str,
    context: Any,
    start_s: float,
    end_s: float,
    about: Mapping[str, Any],
    ids: tuple[int, int] | None = None,
) -> None:
    """Record a span that is over, with attributes `about`; times are seconds since 1970."""
    known = _NEXT_IDS.set(ids)
    try:
        span = _tracer.start_span(name, context=context, start_time=int(start_s * 1e9), attributes=about)
    finally:
        _NEXT_IDS.reset(known)
    span.end(int(max(start_s, end_s) * 1e9))


def round_ended(run_id: str, record: Round) -> None:
    """Record a round that has ended, and its commit."""
    if _tracer is None:
        return
    from opentelemetry.context import Context

    ids = round_ids(run_id, record.number)
    start_s = record.started_at.ToNanoseconds() / 1e9
    end_s = start_s + record.duration_seconds
    accepted = [task for task in record.tasks if task.phase == TaskPhase.TASK_PHASE_ACCEPTED]
    about = {"fedgrpc.run_id": run_id, "fedgrpc.round": record.number, "fedgrpc.reason": record.reason}
    about |= {"fedgrpc.tasks": len(record.tasks), "fedgrpc.accepted": len(accepted)}
    _span("round", Context(), start_s, end_s, about, ids)
    if record.phase == RoundPhase.ROUND_PHASE_COMMITTED:
        global_s = max((task.timings.global_seconds for task in accepted), default=0.0)
        _span("commit", _below(*ids), end_s - global_s, end_s, {"fedgrpc.version": record.committed_version})


def metadata(run_id: str, number: int, token: str) -> tuple[tuple[str, str], ...]:
    """Return the metadata of calls about a task; none without traces."""
    return () if _tracer is None else ((TRACEPARENT, traceparent(run_id, number, token)),)


def task_delivered(run_id: str, number: int, token: str, worker: str, timings: Timings) -> None:
    """Record a task whose update the aggregator has just acknowledged, by the worker's own account of its time."""
    if _tracer is None:
        return
    trace_id, round_span = round_ids(run_id, number)
    span_id, at = _ids(token)[1], time.time()
    parts = {
        "download": timings.download_seconds,
        "local": timings.local_seconds,
        "upload": timings.upload_seconds,
    }
    start_s = at - sum(parts.values())
    about = {"fedgrpc.worker": worker, "fedgrpc.round": number}
    _span("task", _below(trace_id, round_span), start_s, at, about, (trace_id, span_id))
    for part, seconds in parts.items():
        _span(part, _below(trace_id, span_id), start_s, start_s + seconds, {})
        start_s += seconds


def served(context: Any, method: str) -> Any:
    """Return a context manager that records a call which its caller has put into a trace."""
    return nullcontext() if _tracer is None else _served(context, method)


@contextmanager
def _served(context: Any, method: str) -> Iterator[None]:
    found = dict(context.invocation_metadata() or ()).get(TRACEPARENT, "")
    match = _PARENT.fullmatch(found) if isinstance(found, str) else None
    if match is None:
        yield
        return
    trace_id, span_id = (int(part, 16) for part in match.groups())
    name = method.removeprefix("/fedgrpc.v1.")
    if not (trace_id and span_id):
        yield
        return
    span = _tracer.start_span(name, context=_below(trace_id, span_id))
    try:
        yield
    except BaseException as error:
        # Cancelled, too: the span of a call that its caller gave up says so.
        span.set_attribute("error.type", type(error).__name__)
        raise
    finally:
        span.end()
