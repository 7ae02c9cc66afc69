"""Templates of the page.

The rule: every text may be a peer's, so all are escaped, and none carries control characters.
"""

from __future__ import annotations

import math
import time
from typing import Any, Final
from urllib.parse import quote

from google.protobuf.timestamp_pb2 import Timestamp
from jinja2 import Environment, PackageLoader, StrictUndefined

from fedgrpc import __version__
from fedgrpc.claims import printable
from fedgrpc.v1.models_pb2 import Release, ReleasePhase
from fedgrpc.web import fleet, rounds
from fedgrpc.words import rate, round_phase, run_phase, scores, seconds, size, task_phase

_MINUTE_S: Final = 60
_HOUR_S: Final = 3600
_DAY_S: Final = 86_400


def duration(value: float) -> str:
    """Return a time as people say it: 7.2 s, 4 min, 3 h, 12 days."""
    if not math.isfinite(value):
        return "unknown"
    for unit_s, unit, least in ((_DAY_S, "days", 2), (_HOUR_S, "h", 2), (_MINUTE_S, "min", 2)):
        if value >= least * unit_s:
            return f"{value / unit_s:.0f} {unit}"
    return f"{value:.0f} s" if value >= 1 else seconds(value)


def ago(at: Timestamp) -> str:
    """Return how long ago a time is, by this machine's clock."""
    passed = time.time() - at.ToNanoseconds() / 1e9
    return "just now" if passed < 1 else f"{duration(passed)} ago"


def release_phase(release: Release) -> str:
    """Return `canary`, `rollout`, `done`, `rolled back` or `aborted`."""
    return ReleasePhase.Name(release.phase).removeprefix("RELEASE_PHASE_").replace("_", " ").lower()


def in_path(text: str) -> str:
    """Return a text as one segment of a URL's path."""
    return quote(text, safe="")


def _shown(value: object) -> object:
    # Not of `Markup`, which this page's own templates have made.
    return printable(value) if type(value) is str else value


def environment() -> Environment:
    """Return the environment of the templates in this folder."""
    made = Environment(
        loader=PackageLoader("fedgrpc.web"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    made.globals.update(version=__version__, fleet=fleet, rounds=rounds)
    filters: dict[str, Any] = {
        **{"ago": ago, "duration": duration, "in_path": in_path, "rate": rate, "scores": scores},
        **{"seconds": seconds, "size": size, "round_phase": round_phase, "run_phase": run_phase},
        **{"task_phase": task_phase, "release_phase": release_phase},
    }
    made.filters.update(filters)
    return made
