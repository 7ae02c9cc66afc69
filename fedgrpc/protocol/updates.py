"""Headers of updates, from the report of a worker or a leaf and back."""

from __future__ import annotations

from fedgrpc import claims
from fedgrpc.aggregation.admission import AdmissionPolicy, check_counts
from fedgrpc.codec.manifest import Manifest
from fedgrpc.errors import UpdateRefused
from fedgrpc.protocol.records import metrics_from_proto, timings_from_proto, timings_to_proto
from fedgrpc.protocol.tensors import channels_to_proto, manifest_to_proto
from fedgrpc.rounds.history import Timings
from fedgrpc.runs.task_context import Report
from fedgrpc.submodels.channels import ChannelMap
from fedgrpc.v1.aggregator_pb2 import UpdateHeader


def report_to_proto(
    report: Report,
    token: str,
    worker: str = "",
    manifest: Manifest | None = None,
    channels: ChannelMap | None = None,
) -> UpdateHeader:
    """Return the header of the update under `token`, whose payload has this manifest."""
    return UpdateHeader(
        worker=worker,
        token=token,
        manifest=None if manifest is None else manifest_to_proto(manifest),
        example_count=report.example_count,
        steps=report.steps,
        metrics=report.metrics,
        evaluation_metrics=report.evaluation_metrics,
        evaluation_example_count=report.evaluation_example_count,
        timings=timings_to_proto(report.timings),
        peak_memory_bytes=report.peak_memory_bytes,
        channels=None if channels is None else channels_to_proto(channels),
        merged_updates=report.merged_updates,
        weight=report.weight,
        tensor_bytes=report.tensor_bytes,
        accumulated_steps=report.accumulated_steps,
        unchanged=report.unchanged,
        scores_of_sub_models=report.scores_of_sub_models,
        scores_not_finite=sorted(report.scores_not_finite),
        noise_ratio=report.noise_ratio,
        clipped=report.clipped,
    )


def sent_header(
    header: UpdateHeader, worker: str, manifest: Manifest, timings: Timings, peak_memory_bytes: int
) -> UpdateHeader:
    """Return the header of a stored mean as `worker` sends it, with a payload of this manifest."""
    sent = UpdateHeader()
    sent.CopyFrom(header)
    sent.worker = worker
    sent.manifest.CopyFrom(manifest_to_proto(manifest))
    sent.timings.CopyFrom(timings_to_proto(timings))
    sent.peak_memory_bytes = peak_memory_bytes
    return sent


def report_from_proto(header: UpdateHeader, policy: AdmissionPolicy) -> Report:
    """Return the report in a header. Raises `UpdateRefused` and `LayoutError`."""
    metrics = metrics_from_proto(header.metrics)
    evaluation_metrics = metrics_from_proto(header.evaluation_metrics)
    check_counts(header.example_count, {**metrics, **evaluation_metrics}, policy)
    if header.merged_updates and not 0 < header.weight <= policy.max_example_count:
        raise UpdateRefused(f"the summed weight {header.weight:g} is not from above 0 to the bound")
    # Where it decides, `check_steps` holds it against the plan.
    accumulated_steps = claims.ACCUMULATED_STEPS.clamped(header.accumulated_steps)
    return Report(
        claims.EXAMPLES.checked(header.example_count),
        claims.STEPS.checked(header.steps),
        metrics,
        evaluation_metrics,
        claims.EXAMPLES.checked(header.evaluation_example_count),
        timings_from_proto(header.timings),
        header.manifest.size_bytes,
        claims.MEMORY_BYTES.clamped(header.peak_memory_bytes),
        claims.MERGED_UPDATES.checked(header.merged_updates),
        claims.WEIGHT.checked(header.weight) if header.merged_updates else 0.0,
        claims.MEMORY_BYTES.clamped(header.tensor_bytes),
        accumulated_steps if header.merged_updates else 0.0,
        header.unchanged,
        header.scores_of_sub_models,
        frozenset(metrics_from_proto(dict.fromkeys(header.scores_not_finite, 0.0))),
        0.0 if header.merged_updates else claims.NOISE_RATIO.clamped(header.noise_ratio),
        header.clipped,
    )
