"""Availability traces: when each device can be reached, as a file tells it.

A trace is CSV with a header, one row for each stretch in which a device can be reached, in seconds:

    # period_s = 604800
    device,from_s,to_s
    phone-1,0,25200
    phone-1,79200,86400

Stretches of one device neither overlap nor leave the period, after which the trace begins anew; without the
comment the period ends with the last stretch. Devices of a fleet take the devices of the trace in their order of
appearance, and begin again with the first when there are more of them.

The rule: this module reads text and knows no files.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedgrpc.errors import UsageError

MOST_STRETCHES = 10_000_000
_HEADER = ["device", "from_s", "to_s"]
_PERIOD = re.compile(r"#\s*period_s\s*=\s*(\S+)\s*")

# From and to, seconds.
Stretch = tuple[float, float]


@dataclass(frozen=True)
class Trace:
    """Stretches by device, in order, within one period of `period_s` seconds. Raises `UsageError` for others."""

    period_s: float
    stretches: Mapping[str, Sequence[Stretch]]

    def __post_init__(self) -> None:
        if not self.stretches:
            raise UsageError("the trace has no stretch in which a device can be reached")
        if not 0 < self.period_s < math.inf:
            raise UsageError(f"the period of a trace must be positive, not {self.period_s:g}")
        for device, stretches in self.stretches.items():
            last_s = 0.0
            for from_s, to_s in stretches:
                if not (last_s <= from_s < to_s <= self.period_s):
                    raise UsageError(
                        f"device {device!r} of the trace: {from_s:g} to {to_s:g} overlaps another stretch, is "
                        f"empty, or is not within the period of {self.period_s:g} s"
                    )
                last_s = to_s

    def changes(self, number: int) -> DeviceChanges:
        """Return when the device of that number in a fleet comes and goes."""
        stretches = list(self.stretches.values())
        return DeviceChanges(self.period_s, stretches[number % len(stretches)])

    def available_share(self) -> float:
        """Return the share of the time that a device can be reached, in the mean."""
        summed = sum(to_s - from_s for each in self.stretches.values() for from_s, to_s in each)
        return summed / (self.period_s * len(self.stretches))

    def to_csv(self) -> str:
        """Return the trace as a file has it."""
        out = io.StringIO()
        out.write(f"# period_s = {self.period_s:g}\n")
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(_HEADER)
        for device, stretches in self.stretches.items():
            writer.writerows([device, f"{from_s:.10g}", f"{to_s:.10g}"] for from_s, to_s in stretches)
        return out.getvalue()

    @classmethod
    def parse(cls, text: str) -> Trace:
        """Read the text of a file. Raises `UsageError`, which names the line."""
        period_s: float | None = None
        stretches: dict[str, list[Stretch]] = {}
        count, header = 0, False
        for number, row in _rows(text):
            if row[0].startswith("#"):
                if found := _PERIOD.fullmatch(",".join(row)):
                    period_s = _seconds(found[1], number)
            elif not header:
                if [cell.strip() for cell in row] != _HEADER:
                    raise UsageError(f"line {number}: a trace begins with the header {','.join(_HEADER)}")
                header = True
            else:
                count += 1
                if len(row) != len(_HEADER):
                    raise UsageError(f"line {number}: a stretch is {','.join(_HEADER)}, not {len(row)} cells")
                if count > MOST_STRETCHES:
                    raise UsageError(f"a trace has at most {MOST_STRETCHES} stretches")
                stretch = _seconds(row[1], number), _seconds(row[2], number)
                stretches.setdefault(row[0].strip(), []).append(stretch)
        return trace_of(stretches, period_s)


def _rows(text: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text))
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except csv.Error as error:
        raise UsageError(f"line {reader.line_num}: {error}") from error


def _seconds(text: str, line: int) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"line {line}: {text.strip()[:40]!r} is no number of seconds")
    return value


def trace_of(stretches: Mapping[str, Iterable[Stretch]], period_s: float | None = None) -> Trace:
    """Return the trace of these stretches, sorted and joined where they touch or overlap.

    Without a period it ends with the last stretch. Raises `UsageError` as `Trace`.
    """
    joined = {device: _joined(each) for device, each in stretches.items()}
    if period_s is None:
        period_s = max((each[-1][1] for each in joined.values() if each), default=0.0)
    return Trace(period_s, {device: each for device, each in joined.items() if each})


def _joined(stretches: Iterable[Stretch]) -> tuple[Stretch, ...]:
    result: list[Stretch] = []
    for from_s, to_s in sorted(stretches):
        if result and from_s <= result[-1][1]:
            result[-1] = result[-1][0], max(to_s, result[-1][1])
        else:
            result.append((from_s, to_s))
    return tuple(result)


class DeviceChanges:
    """Times at which one device comes and goes, from time 0, period after period."""

    def __init__(self, period_s: float, stretches: Sequence[Stretch]) -> None:
        self._period_s = period_s
        times = [time for stretch in stretches for time in stretch]
        # A stretch that ends with the period goes on with one that begins it.
        self.reachable = bool(times) and times[0] == 0
        if self.reachable and times[-1] == period_s:
            times = times[1:-1]
        elif self.reachable:
            times = [*times[1:], period_s]
        self._times = np.asarray(times)
        self._next = 0

    def next_change(self) -> float:
        """Return the time of the next change, seconds; infinite where the device always is as it is now."""
        if not self._times.size:
            return math.inf
        periods, index = divmod(self._next, self._times.size)
        self._next += 1
        return float(periods * self._period_s + self._times[index])
