"""`fedgrpc trace generate` and `fedgrpc trace import`: availability traces for simulations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fedgrpc.cli.options import Declare, SettingsCommand
from fedgrpc.errors import UsageError
from fedgrpc.simulation.trace_sources import Site, diurnal, from_fedscale, from_flash
from fedgrpc.simulation.traces import Trace

_generate = Declare("The trace")
_import = Declare("The trace")
_OUT: dict[str, Any] = {"type": click.Path(path_type=Path, dir_okay=False), "required": True}


def _write(trace: Trace, out: Path) -> None:
    try:
        out.write_text(trace.to_csv())
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error.strerror}") from error
    days = trace.period_s / 86_400
    click.echo(
        f"{out}: {len(trace.stretches)} devices, {days:g} days, there {trace.available_share():.0%} of the time"
    )


def _run_generate(**values: Any) -> None:
    sites = values["sites"]
    count, rest = divmod(values["devices"], sites)
    if not count:
        raise UsageError(f"devices must be at least as many as sites, {sites}")
    places = [Site(count + (number < rest), values["hours_apart"] * number) for number in range(sites)]
    trace = diurnal(
        places,
        values["days"],
        values["seed"],
        night_share=values["night_share"],
        day_share=values["day_share"],
        outages_per_day=values["outages"],
    )
    _write(trace, values["out"])


def _run_import(**values: Any) -> None:
    path: Path = values["file"]
    try:
        data = path.read_bytes()
        trace = from_fedscale(data) if values["form"] == "fedscale" else from_flash(data.decode())
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, UsageError) as error:
        raise UsageError(f"{path}: {error}") from error
    _write(trace, values["out"])


GENERATE = SettingsCommand(
    "trace generate",
    _run_generate,
    [
        _generate("--devices", "Number of devices.", type=click.IntRange(1), default=100),
        _generate(
            "--days", "Length of the trace, after which it is repeated.", type=click.IntRange(1, 366), default=7
        ),
        _generate(
            "--sites", "Places with a time zone and outages of their own.", type=click.IntRange(1), default=1
        ),
        _generate("--hours-apart", "Difference of the time zones of two sites.", type=float, default=8.0),
        _generate("--night-share", "Share of the nights in which a device is there.", type=float, default=0.9),
        _generate("--day-share", "Share of the days in which it is there for a while.", type=float, default=0.15),
        _generate("--outages", "Outages of a whole site in a day.", type=float, default=0.0),
        _generate("--seed", "Seed; the same seed gives the same trace.", type=click.IntRange(0), default=0),
        _generate("--out", "CSV file to write.", **_OUT),
    ],
    "Write the trace of devices that are there at night, by site.",
)
IMPORT = SettingsCommand(
    "trace import",
    _run_import,
    [
        click.Argument(["file"], type=click.Path(path_type=Path, dir_okay=False)),
        _import(
            "--from",
            "Format: client_behave_trace of FedScale, or user_behavior of FLASH (JSON).",
            name="form",
            type=click.Choice(("fedscale", "flash")),
            required=True,
        ),
        _import("--out", "CSV file to write.", **_OUT),
    ],
    "Convert a published trace.",
)
