"""Each alert fires for what it is there for, and for nothing usual; it asks for metrics that are served."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.manifests import K8S, render
from tests.deploy.test_dashboard import served as served  # a fixture

ALERTS = Path(__file__).parents[2] / "docker" / "prometheus" / "alerts.yaml"
RULES = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
NAMES = [rule["alert"] for rule in RULES]

RUNNING = {'fedgrpc_run_phase{run="r", phase="running"}': "1x1500"}
OTHERS = {"fedgrpc_build_info": "1x1500"}
# By alert: series in which it fires at the end of the 25th hour, a sample a minute, and such in which it does not.
CASES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "FedgrpcGone": ({}, {"fedgrpc_build_info": "1x1500"}),
    "FedgrpcNotServing": ({"fedgrpc_serving": "0x1500"}, {"fedgrpc_serving": "1x1490 0x3 1x20"}),
    "FedgrpcNoRoundForAnHour": (
        {**RUNNING, 'fedgrpc_run_round{run="r"}': "7x1500"},
        {'fedgrpc_run_phase{run="r", phase="running"}': "0x1500", 'fedgrpc_run_round{run="r"}': "7x1500"},
    ),
    "FedgrpcRoundsAbandoned": (
        {
            'fedgrpc_rounds_total{run="r", outcome="abandoned"}': "0+0.1x1500",
            'fedgrpc_rounds_total{run="r", outcome="committed"}': "0x1500",
        },
        {
            'fedgrpc_rounds_total{run="r", outcome="abandoned"}': "0+0.1x1500",
            'fedgrpc_rounds_total{run="r", outcome="committed"}': "0+0.2x1500",
        },
    ),
    "FedgrpcRunPaused": (
        {'fedgrpc_run_phase{run="r", phase="paused"}': "1x1500"},
        {'fedgrpc_run_phase{run="r", phase="paused"}': "0x1470 1x30"},
    ),
    "FedgrpcRunLacksWorkers": (
        {'fedgrpc_run_workers{run="r", state="wanted"}': "3x1500"},
        {'fedgrpc_run_workers{run="r", state="wanted"}': "3x1490 0x10"},
    ),
    "FedgrpcFleetShrinks": (
        {**RUNNING, 'fedgrpc_run_workers{run="r", state="eligible"}': "10x1400 6x100"},
        {**RUNNING, 'fedgrpc_run_workers{run="r", state="eligible"}': "10x1400 8x100"},
    ),
    "FedgrpcScoresNotFinite": (
        {'fedgrpc_scores_not_finite_total{run="r"}': "0x1480 1x20"},
        {'fedgrpc_scores_not_finite_total{run="r"}': "3x1500"},
    ),
    "FedgrpcVersionJumps": (
        {'fedgrpc_jumps_total{run="r", of="norm"}': "0x1480 1x20"},
        {'fedgrpc_jumps_total{run="r", of="norm"}': "1x1500"},
    ),
    "FedgrpcUpdatesRefused": (
        {
            'fedgrpc_tasks_total{run="r", outcome="rejected"}': "0+0.2x1500",
            'fedgrpc_tasks_total{run="r", outcome="accepted"}': "0+1x1500",
        },
        {
            'fedgrpc_tasks_total{run="r", outcome="rejected"}': "0+0.2x1500",
            'fedgrpc_tasks_total{run="r", outcome="accepted"}': "0+9x1500",
        },
    ),
    "FedgrpcTasksFail": (
        {
            'fedgrpc_tasks_total{run="r", outcome="failed"}': "0+1x1500",
            'fedgrpc_tasks_total{run="r", outcome="accepted"}': "0+1x1500",
        },
        {
            'fedgrpc_tasks_total{run="r", outcome="failed"}': "0+1x1500",
            'fedgrpc_tasks_total{run="r", outcome="accepted"}': "0+4x1500",
        },
    ),
    "FedgrpcTasksLate": (
        {
            'fedgrpc_tasks_total{run="r", outcome="late"}': "0+1x1500",
            'fedgrpc_tasks_total{run="r", outcome="expired"}': "0+1x1500",
            'fedgrpc_tasks_total{run="r", outcome="accepted"}': "0+1x1500",
        },
        {
            'fedgrpc_tasks_total{run="r", outcome="late"}': "0+1x1500",
            'fedgrpc_tasks_total{run="r", outcome="accepted"}': "0+2x1500",
        },
    ),
    "FedgrpcDiskAlmostFull": (
        {"fedgrpc_data_free_bytes": "100e9-60e6x1500"},
        {"fedgrpc_data_free_bytes": "100e9x1500"},
    ),
    "FedgrpcCertificateEnds": (
        {"fedgrpc_certificate_end_seconds": "864000x1500"},
        {"fedgrpc_certificate_end_seconds": "8640000x1500"},
    ),
    "FedgrpcDevicesLeave": ({"fedgrpc_members_leaving": "2x1500"}, {"fedgrpc_members_leaving": "0x1500"}),
    "FedgrpcMembersWait": (
        {'fedgrpc_members{state="pending"}': "1x1500"},
        {'fedgrpc_members{state="pending"}': "0x1000 1x500"},
    ),
    "FedgrpcFewFilesLeft": (
        {"process_open_fds": "900x1500", "process_max_fds": "1000x1500"},
        {"process_open_fds": "90x1500", "process_max_fds": "1000x1500"},
    ),
}


def test_every_alert_has_a_case_and_a_text():
    assert sorted(CASES) == sorted(NAMES)
    assert len(NAMES) >= 12
    for rule in RULES:
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert {"summary", "description"} == rule["annotations"].keys()


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_an_alert_asks_for_what_is_served(rule, served):
    for name, labels in re.findall(r"\b((?:fedgrpc|process)_\w+)(?:\{([^}]*)\})?", rule["expr"]):
        if name == "fedgrpc_certificate_end_seconds":
            # Served where there is such a certificate: tests/test_gauges.py.
            continue
        assert name in served
        for label, values in re.findall(r'(\w+)=~?"([^"]*)"', labels):
            assert {*values.split("|")} <= served[name][label]


def sample(series: dict[str, str]) -> list[dict[str, str]]:
    """Series of one instance, as a scrape has them."""
    found = []
    for name, values in series.items():
        labelled = name.replace("{", '{instance="a", ') if "{" in name else f'{name}{{instance="a"}}'
        found.append({"series": labelled, "values": values})
    return found


@pytest.mark.parametrize("name", NAMES)
def test_an_alert_fires_for_what_it_is_there_for_and_for_nothing_usual(name, tmp_path):
    if shutil.which("promtool") is None:
        pytest.skip("promtool is missing: apt-get install prometheus")
    fires, stays_quiet = CASES[name]
    # Alone: all of them over a day take promtool seconds.
    (rule,) = (rule for rule in RULES if rule["alert"] == name)
    rules = tmp_path / "rules.yaml"
    rules.write_text(json.dumps({"groups": [{"name": "fedgrpc", "rules": [rule]}]}))
    tests: list[dict[str, Any]] = []
    for series, firing in ((fires, True), (stays_quiet, False)):
        shown = {**({} if name == "FedgrpcGone" else OTHERS), **series}
        # Of an alert that fires, only its name is compared: promtool wants all labels and texts to be given.
        count = f'count(ALERTS{{alertname="{name}", alertstate="firing"}})'
        expected = [{"labels": "{}", "value": 1}] if firing else []
        query = {"expr": count, "eval_time": "25h", "exp_samples": expected}
        tests.append({"interval": "1m", "input_series": sample(shown), "promql_expr_test": [query]})
    file = tmp_path / "alerts.test.yaml"
    file.write_text(json.dumps({"rule_files": [str(rules)], "evaluation_interval": "5m", "tests": tests}))
    done = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_kubernetes_has_the_same_alerts():
    (rules,) = render(K8S / "overlays" / "monitoring").of("PrometheusRule")
    assert rules["spec"] == yaml.safe_load(ALERTS.read_text())
