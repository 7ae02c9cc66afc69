"""One trace a round: spans of the aggregator and of its workers, whose ids nobody has to hand out."""

import asyncio

import pytest

from fedgrpc import tracing
from fedgrpc.errors import UsageError
from fedgrpc.v1.round_pb2 import Round
from tests.support.running_federation import ShiftTrainer, running_aggregator, start_worker

pytestmark = pytest.mark.extras


@pytest.fixture
def exporter():
    pytest.importorskip("opentelemetry.sdk", reason="needs fedgrpc[otel]: make test-extras")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    found = InMemorySpanExporter()
    tracing.begin("tests", SimpleSpanProcessor(found))
    yield found
    tracing.end()


def named(spans, name):
    return [span for span in spans if span.name == name]


async def test_spans_of_both_sides_of_a_round_are_one_trace(exporter, tmp_path):
    async with running_aggregator(tmp_path, rounds=1) as running:
        workers = [start_worker(running, tmp_path, name, ShiftTrainer()) for name in ("a", "b")]
        await running.until_finished()
        run_id = (await running.run()).id
        await asyncio.gather(*workers)
    spans = exporter.get_finished_spans()
    (round_,) = named(spans, "round")
    (commit,) = named(spans, "commit")
    tasks = named(spans, "task")
    trace_id, span_id = tracing.round_ids(run_id, 1)
    assert (round_.context.trace_id, round_.context.span_id) == (trace_id, span_id)
    assert {span.context.trace_id for span in spans} == {trace_id}
    assert commit.parent.span_id == span_id
    assert [task.parent.span_id for task in tasks] == [span_id, span_id]
    assert sorted(task.attributes["fedgrpc.worker"] for task in tasks) == ["a", "b"]
    own = {task.context.span_id for task in tasks}
    for name in ("download", "local", "upload", "Aggregator/PushUpdate"):
        assert {span.parent.span_id for span in named(spans, name)} == own, name
    assert round_.attributes["fedgrpc.accepted"] == 2


def test_ids_follow_from_run_round_and_token_alone():
    assert tracing.round_ids("run", 1) == tracing.round_ids("run", 1)
    assert tracing.round_ids("run", 1) != tracing.round_ids("run", 2)
    parent = tracing.traceparent("run", 1, "token")
    version, trace_id, span_id, flags = parent.split("-")
    assert (version, len(trace_id), len(span_id), flags) == ("00", 32, 16, "01")
    assert int(trace_id, 16) == tracing.round_ids("run", 1)[0]


def test_without_a_beginning_nothing_is_sent_and_nothing_imported():
    assert tracing.metadata("run", 1, "token") == ()
    tracing.round_ended("run", Round(number=1))
    with tracing.served(None, "/fedgrpc.v1.Aggregator/PullModel"):
        pass


@pytest.mark.parametrize("found", ["", "00-zz", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "ff-1-1-01", b"\x00"])
def test_a_traceparent_that_is_none_is_ignored(exporter, found):
    class Context:
        def invocation_metadata(self):
            return ((tracing.TRACEPARENT, found),)

    with tracing.served(Context(), "/fedgrpc.v1.Aggregator/PullModel"):
        pass
    assert exporter.get_finished_spans() == ()


def test_an_exporter_that_nobody_knows_is_refused_by_name():
    tracing.begin_by_environment("tests", {})
    with pytest.raises(UsageError, match="zipkin"):
        tracing.begin_by_environment("tests", {"OTEL_TRACES_EXPORTER": "zipkin"})
