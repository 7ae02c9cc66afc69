"""`fedgrpc privacy`: what the versions of a run have cost each device so far, and what those planned will.

From a running aggregator, or from the data folder of one that does not run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import click

from fedgrpc.cli import as_json
from fedgrpc.cli.options import AS_JSON, SettingsCommand
from fedgrpc.cli.reach import reach_settings, reached
from fedgrpc.cli.stored_runs import find_run
from fedgrpc.cli.view import print_rows
from fedgrpc.errors import LinkError, NotFound
from fedgrpc.privacy.ledger import Ledger, ledger_of
from fedgrpc.privacy.policy import PrivacyPolicy
from fedgrpc.protocol.privacy import ledger_from_proto, rules_to_proto
from fedgrpc.storage.database import DATABASE
from fedgrpc.storage.run_store import RunStore

# A table has so many of the last releases, and of those planned the next ones and the last.
_SHOWN: Final = 12
_NEXT: Final = 3


@dataclass(frozen=True)
class Loss:
    """The ledger of a run, and how many releases are planned beside it."""

    ledger: Ledger
    planned: int

    def epsilons(self) -> list[float]:
        """Return epsilon after each release, then after each that is planned."""
        past = [
            replace(self.ledger, releases=self.ledger.releases[:count]).epsilon()
            for count in range(1, len(self.ledger.releases) + 1)
        ]
        return [*past, *(self.ledger.epsilon(more) for more in range(1, self.planned + 1))]


def _privacy(**values: Any) -> None:
    folder = values["data_dir"]
    try:
        loss = asyncio.run(_asked(values))
    except LinkError:
        if folder is None:
            raise
        loss = stored(find_run(folder, values["run"] or ""))
    if values["as_json"]:
        click.echo(as_json.json_text(_plain(loss)))
    else:
        _print(loss)


async def _asked(values: Mapping[str, Any]) -> Loss:
    async with reached(values) as client:
        message = await client.of(values["run"] or "").privacy()
    return Loss(ledger_from_proto(message), message.planned)


def stored(folder: Path) -> Loss:
    """Read the ledger from a run's folder. Raises `NotFound` for a run without noise, and `StorageError`."""
    with closing(RunStore(folder / DATABASE, read_only=True)) as store:
        releases, settings, version = store.releases(), store.settings(), store.latest_version()
    if "privacy.mechanism" not in settings:
        raise NotFound("this run releases its versions without noise")
    trained = 0 if version is None else version.trained
    planned = max(0, int(settings["rounds"]) - trained) if "rounds" in settings else 0
    target, multiplier = settings.get("privacy.target_epsilon"), settings.get("privacy.noise_multiplier")
    rate = settings.get("policy.poisson_rate")
    policy = PrivacyPolicy(
        settings["privacy.mechanism"],  # type: ignore[arg-type]
        None if multiplier is None else float(multiplier),
        None if target is None else float(target),
        float(settings["privacy.delta"]),
        int(settings["privacy.cohort"]),
        int(settings["privacy.min_separation"]),
    )
    clip_norm, rate_used = float(settings["clip_norm"]), None if rate is None else float(rate)
    quantile = settings.get("clip_quantile")
    quantile_used = None if quantile is None else float(quantile)
    return Loss(ledger_of(policy, clip_norm, rate_used, planned, releases, clip_quantile=quantile_used), planned)


def _plain(loss: Loss) -> dict[str, Any]:
    ledger, epsilons = loss.ledger, loss.epsilons()
    done = len(ledger.releases)
    releases = [
        {
            **{"step": each.step, "round": each.round, "version": each.version, "updates": each.count},
            "epsilon": epsilon,
            "rules": as_json.plain(rules_to_proto(each.rules)),
        }
        for each, epsilon in zip(ledger.releases, epsilons[:done], strict=True)
    ]
    return {
        "delta": ledger.delta,
        "target_epsilon": ledger.target_epsilon,
        "epsilon": epsilons[done - 1] if done else 0.0,
        "rules": as_json.plain(rules_to_proto(ledger.rules)),
        "releases": releases,
        "planned": [
            {"step": step, "epsilon": epsilon} for step, epsilon in enumerate(epsilons[done:], start=done + 1)
        ],
    }


def _print(loss: Loss) -> None:
    ledger, rules, epsilons = loss.ledger, loss.ledger.rules, loss.epsilons()
    done = len(ledger.releases)
    now = epsilons[done - 1] if done else 0.0
    target = "" if ledger.target_epsilon is None else f", of at most {ledger.target_epsilon:g}"
    click.echo(
        f"epsilon {now:.4g}{target} at delta {ledger.delta:g}, after {done} of {done + loss.planned} versions"
    )
    adapts = (
        "" if rules.clip_quantile is None else f", that of the quantile {rules.clip_quantile:g} and still to move,"
    )
    chosen = "" if rules.rate is None else f", each device sampled with chance {rules.rate:g}"
    apart = "" if rules.min_separation == 1 else f", a device at most once in {rules.min_separation} versions"
    click.echo(
        f"{rules.mechanism}: noise {rules.noise_multiplier:.4g} times clip norm {rules.clip_norm:.4g}{adapts} "
        f"over {rules.cohort} devices{chosen}{apart}"
    )
    rows = [
        [
            *map(str, (each.step, each.round, each.version, each.count)),
            f"{each.rules.clip_norm:.4g}",
            f"{epsilon:.4g}",
        ]
        for each, epsilon in zip(ledger.releases, epsilons[:done], strict=True)
    ]
    planned = [
        [str(step), "", "", "planned", "", f"{epsilons[step - 1]:.4g}"]
        for step in range(done + 1, len(epsilons) + 1)
    ]
    if len(planned) > _NEXT + 1:
        planned = [*planned[:_NEXT], ["...", "", "", "", "", ""], planned[-1]]
    print_rows(
        ("RELEASE", "ROUND", "VERSION", "UPDATES", "CLIP NORM", "EPSILON"),
        rows[-_SHOWN:] + planned,
        "no version yet",
    )


COMMAND = SettingsCommand(
    "privacy",
    _privacy,
    [
        AS_JSON,
        *reach_settings("Data folder of a run on this host; where no aggregator runs, the folder itself is read."),
    ],
    "What a run's versions have cost each device in privacy, and what those planned will.",
)
COMMAND.params[:0] = [click.Argument(["run"], required=False)]
