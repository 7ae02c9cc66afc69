"""`fedgrpc release`: give a version of a run's model to the applications on devices, canaries first.

    fedgrpc release RUN@best --canary 10% --watch 'accuracy>=0.9' --after 1h

exit code 0     done
          1     no such run, version or release; the certificate is not an operator's
          2     a canary, a condition or a time that cannot be used
          3     a release is in progress, or the one that is meant has ended
          4     no aggregator answers
"""

from __future__ import annotations

import statistics
from typing import Any, Final

import click
from google.protobuf.timestamp_pb2 import Timestamp

from fedgrpc.calls import Calls
from fedgrpc.claims import printable
from fedgrpc.cli.as_json import json_text, plain
from fedgrpc.cli.models import argument
from fedgrpc.cli.options import AS_JSON, Declare
from fedgrpc.cli.reach import client_command
from fedgrpc.cli.values import DURATION
from fedgrpc.cli.view import print_rows, time_text
from fedgrpc.protocol.durations import duration_from_proto
from fedgrpc.runs.keeping import Reference
from fedgrpc.v1 import models_pb2 as pb
from fedgrpc.words import scores

_what = Declare("What")
_SHOWN_NAMES: Final = 5


def release_line(release: pb.Release) -> str:
    """Describe a release in one line."""
    canaries = sorted(release.canaries)
    shown = ", ".join(canaries[:_SHOWN_NAMES]) + (", ..." if len(canaries) > _SHOWN_NAMES else "")
    parts = [f"release {release.number}", f"{release.run}@{release.version}", phase_of(release)]
    parts.append(f"{len(canaries)} {'canary' if len(canaries) == 1 else 'canaries'}: {shown}")
    return printable(" · ".join(parts) + (f" ({release.reason})" if release.reason else ""))


def phase_of(release: pb.Release) -> str:
    """Return `canary`, `rolled back`, ..."""
    return pb.ReleasePhase.Name(release.phase).removeprefix("RELEASE_PHASE_").replace("_", " ").lower()


def _conditions(release: pb.Release) -> str:
    return ", ".join(f"{each.name}{'>=' if each.at_least else '<='}{each.value:g}" for each in release.conditions)


async def _start(client: Calls, values: dict[str, Any]) -> None:
    reference = Reference.parse(values["version"])
    release = await client.models.start_release(
        *(reference.run, reference.name, values["canary"], list(values["watch"])),
        *(values["after_s"], values["within_s"]),
    )
    click.echo(release_line(release))


async def _list(client: Calls, values: dict[str, Any]) -> None:
    releases = await client.models.releases(values["run"])
    if values["as_json"]:
        click.echo(json_text([plain(each) for each in releases]))
        return
    rows = [
        (
            *(str(each.number), str(each.version), phase_of(each), _time(each.started_at)),
            *(str(len(each.canaries)), str(each.report_count), _conditions(each), each.reason),
        )
        for each in releases
    ]
    columns = ("release", "version", "phase", "started", "canaries", "reports", "watched", "reason")
    print_rows(columns, rows, "nothing was released yet")


async def _show(client: Calls, values: dict[str, Any]) -> None:
    reference = Reference.parse(values["run"])
    number = int(reference.name) if reference.name.isdigit() else 0
    release = await client.models.release(reference.run, number)
    if values["as_json"]:
        click.echo(json_text(plain(release)))
        return
    click.echo(release_line(release))
    times = f"watched for {duration_from_proto(release.after):g} s, decided within"
    click.echo(
        printable(
            f"by {release.started_by} at {_time(release.started_at)}; {_conditions(release) or 'no condition'}, "
            f"{times} {duration_from_proto(release.within):g} s; before it, {_previous(release)}"
        )
    )
    for condition in release.conditions:
        told = [each.scores[condition.name] for each in release.reports if condition.name in each.scores]
        if told:
            devices = "1 device" if len(told) == 1 else f"{len(told)} devices"
            click.echo(f"median {condition.name} {statistics.median(told):.4g} of {devices}")
    canaries = set(release.canaries)
    rows = [
        (
            *(each.worker, "canary" if each.worker in canaries else "", _time(each.first_at)),
            *(scores(each.scores), each.failure),
        )
        for each in release.reports
    ]
    print_rows(("device", "", "since", "scores", "failure"), rows, "no device has reported yet")


def _previous(release: pb.Release) -> str:
    return f"version {release.previous}" if release.previous else "what devices train on"


async def _abort(client: Calls, values: dict[str, Any]) -> None:
    reference = Reference.parse(values["run"])
    number = int(reference.name) if reference.name.isdigit() else 0
    click.echo(release_line(await client.models.abort_release(reference.run, number, values["reason"])))


def _time(stamp: Timestamp) -> str:
    return time_text(stamp, "%Y-%m-%d %H:%M:%S")


RELEASE_START = client_command(
    "release start",
    _start,
    "Release a VERSION (RUN@best, RUN@17, RUN@TAG) to canaries, and then to all devices, or back, by itself.",
    _what("--canary", "Share or number of the devices that are alive, or their names: pi-1,pi-2.", default="10%"),
    _what(
        "--watch",
        "Condition that the median of the devices' own scores has to meet, as in accuracy>=0.9; repeat for each.",
        name="watch",
        multiple=True,
        default=(),
        metavar="METRIC>=VALUE",
    ),
    _what(
        "--after",
        "How long the canaries are watched, and then all devices.",
        name="after_s",
        type=DURATION,
        default=3600.0,
    ),
    _what(
        "--within",
        "Roll back where most canaries have not reported by then; without: a day, or ten times --after.",
        name="within_s",
        type=DURATION,
        default=None,
    ),
    arguments=[argument("version")],
)
RELEASE_LIST = client_command(
    "release list",
    _list,
    "Show the releases of RUN, newest first; without RUN, those of the only run.",
    AS_JSON,
    arguments=[argument("run", required=False, default="")],
)
RELEASE_SHOW = client_command(
    "release show",
    _show,
    "Show a release, RUN@NUMBER, with what each device reported; without a number, the newest.",
    AS_JSON,
    arguments=[argument("run", required=False, default="")],
)
RELEASE_ABORT = client_command(
    "release abort",
    _abort,
    "End the release in progress: devices serve again what they served before.",
    _what("--reason", "Reason in one line; it is kept.", type=str, default="", metavar="TEXT"),
    arguments=[argument("run", required=False, default="")],
)
