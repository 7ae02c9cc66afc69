"""Releases on the wire and in the database, and scores that devices report of them."""

from __future__ import annotations

from collections.abc import Iterable
from types import MappingProxyType

from google.protobuf.timestamp_pb2 import Timestamp

from fedgrpc.errors import LayoutError
from fedgrpc.protocol.durations import duration_from_proto, duration_to_proto
from fedgrpc.runs.conditions import Condition
from fedgrpc.runs.release import DeviceReport, Release, ReleasePhase, Wanted
from fedgrpc.v1 import models_pb2 as pb


def release_to_proto(release: Release, run: str) -> pb.Release:
    """Return the message of a release of the run with this name, without the reports."""
    return pb.Release(
        number=release.number,
        run=run,
        version=release.version,
        previous=release.previous,
        phase=pb.ReleasePhase.Name(release.phase.value),
        reason=release.reason,
        started_by=release.started_by,
        started_at=_time(release.started_at),
        entered_at=_time(release.entered_at),
        after=duration_to_proto(release.after_s),
        within=duration_to_proto(release.within_s),
        conditions=[
            pb.ScoreCondition(name=each.name, value=each.value, at_least=each.at_least)
            for each in release.conditions
        ],
        canaries=sorted(release.canaries),
        report_count=len(release.reports),
    )


def release_from_proto(message: pb.Release, reports: Iterable[pb.DeviceReport]) -> Release:
    """Return a stored release with its reports. Raises `LayoutError`, and `UsageError` for values out of range."""
    try:
        phase = ReleasePhase(message.phase)
    except ValueError:
        raise LayoutError(f"unknown phase {message.phase} of a release") from None
    return Release(
        number=message.number,
        version=message.version,
        canaries=frozenset(message.canaries),
        conditions=tuple(Condition(each.name, each.value, each.at_least) for each in message.conditions),
        after_s=duration_from_proto(message.after),
        within_s=duration_from_proto(message.within),
        started_at=_seconds(message.started_at),
        previous=message.previous,
        started_by=message.started_by,
        phase=phase,
        entered_at=_seconds(message.entered_at),
        reason=message.reason,
        reports=MappingProxyType({each.worker: _report(each) for each in reports}),
    )


def report_to_proto(worker: str, report: DeviceReport) -> pb.DeviceReport:
    """Return the message of a device's report."""
    return pb.DeviceReport(
        worker=worker, first_at=_time(report.since), scores=report.scores, failure=report.failure
    )


def _report(message: pb.DeviceReport) -> DeviceReport:
    return DeviceReport(_seconds(message.first_at), MappingProxyType(dict(message.scores)), message.failure)


def wanted_to_proto(wanted: Wanted, run: str, run_id: str) -> pb.ServedVersion:
    """Return what a device is to serve of a run."""
    message = pb.ServedVersion(
        run=run,
        run_id=run_id,
        version=wanted.version,
        release=wanted.release,
        without_scores=wanted.without_scores,
    )
    if wanted.score_interval_s is not None:
        message.score_interval.CopyFrom(duration_to_proto(wanted.score_interval_s))
    return message


def _time(seconds: float) -> Timestamp:
    stamp = Timestamp()
    # Microseconds: a float holds no more of today's time, and reading it back gives the same.
    stamp.FromMicroseconds(round(seconds * 1e6))
    return stamp


def _seconds(stamp: Timestamp) -> float:
    return stamp.ToMicroseconds() / 1e6
