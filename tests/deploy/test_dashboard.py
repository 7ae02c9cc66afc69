"""The dashboard asks for metrics that the aggregator serves, by labels and values that it has."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from fedgrpc.gauges import Gauges
from fedgrpc.identity.members import Lives
from fedgrpc.metrics import ProcessMetrics
from fedgrpc.v1.aggregator_pb2 import RunSummary
from fedgrpc.v1.round_pb2 import Round, RoundPhase, TaskPhase, TaskRecord
from tests.deploy.manifests import K8S, render

BOARD = json.loads((K8S / "components" / "monitoring" / "dashboard.json").read_text())
QUERIES = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]
VARIABLES = [item["definition"] for item in BOARD["templating"]["list"] if item["type"] == "query"]
# What Prometheus adds to every series of a pod.
ADDED = {"namespace", "pod"}


@pytest.fixture(scope="module")
def served() -> dict[str, dict[str, set[str]]]:
    """Every sample's name, its labels and their values, once a round has ended."""
    metrics = ProcessMetrics()
    task = TaskRecord(worker="pi-1", phase=TaskPhase.TASK_PHASE_ACCEPTED)
    metrics.of("digits").observe_round(Round(number=1, phase=RoundPhase.ROUND_PHASE_COMMITTED, tasks=[task]))
    gauges = Gauges(metrics.registry)
    gauges.show_runs([RunSummary(name="digits", phase="RUN_PHASE_RUNNING")])
    gauges.show_members([], Lives(), 0.0)
    found: dict[str, dict[str, set[str]]] = {}
    for family in text_string_to_metric_families(generate_latest(metrics.registry).decode()):
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for name, value in sample.labels.items():
                labels.setdefault(name, set()).add(value)
    return found


@pytest.mark.parametrize("query", [*QUERIES, *VARIABLES])
def test_a_query_names_what_is_served(query: str, served: dict[str, dict[str, set[str]]]) -> None:
    names = re.findall(r"\b(?:fedgrpc|process)_\w+", query)
    assert names
    for name in names:
        assert name in served
        for label, value in re.findall(r'(\w+)=~?"([^"]*)"', query):
            assert label in served[name] or label in ADDED
            assert value.startswith("$") or value in served[name][label]
        for group in re.findall(r"by \(([^)]*)\)", query):
            assert set(re.split(r",\s*", group)) <= served[name].keys() | ADDED


def test_every_metric_of_fedgrpc_is_on_the_dashboard(served: dict[str, dict[str, set[str]]]) -> None:
    families = {
        re.sub(r"_(bucket|sum|count|created)$", "", name) for name in served if name.startswith("fedgrpc_")
    }
    shown = " ".join(QUERIES)
    assert not [name for name in families if name.endswith(("_total", "_seconds")) and name not in shown]


def test_panels_do_not_overlap_and_have_numbers_of_their_own() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
    numbers = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(numbers)) == len(numbers)


def test_the_monitor_finds_the_service_and_grafana_the_dashboard() -> None:
    manifests = render(K8S / "overlays" / "monitoring")
    (monitor,) = manifests.of("ServiceMonitor")
    selector: dict[str, Any] = monitor["spec"]["selector"]["matchLabels"]
    (service,) = [
        item for item in manifests.of("Service") if selector.items() <= item["metadata"]["labels"].items()
    ]
    assert monitor["metadata"]["namespace"] == service["metadata"]["namespace"]
    assert {item["port"] for item in monitor["spec"]["endpoints"]} <= {
        port["name"] for port in service["spec"]["ports"]
    }
    (workload,) = manifests.selected(service["spec"]["selector"], "fedgrpc")
    address = workload.environment()["FEDGRPC_AGGREGATOR_METRICS_ADDRESS"]
    assert address == f"0.0.0.0:{workload.ports['metrics']}"
    board = manifests.get("ConfigMap", "fedgrpc-dashboard", "fedgrpc")
    assert board["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(board["data"]["dashboard.json"]) == BOARD


def test_the_dashboard_is_as_it_was_written() -> None:
    path = Path(K8S / "components" / "monitoring" / "dashboard.json")
    assert path.read_text() == json.dumps(BOARD, indent=1) + "\n"
