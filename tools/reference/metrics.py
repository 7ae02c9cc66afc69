"""The Prometheus metrics of an aggregator, from the registries that serve them."""

from __future__ import annotations

import inspect
import re

from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

from fedgrpc import gauges, metrics

HEAD = """# Metrics

`--metrics-address 127.0.0.1:9090` serves these at `/metrics`. There are
[alerts on them](../guide/operate.md#metrics-and-alerts).
Those of a run have the label `run`. Names of workers are never labels: a fleet has thousands.
"""


def page() -> str:
    of_run = metrics.Metrics().registry
    present = CollectorRegistry()
    gauges.Gauges(present)
    return (
        f"{HEAD}\n## Of each run\n\n{_table(of_run)}\n## Of the aggregator\n\n{_table(present)}\n"
        f"## Of its process\n\n{_process()}"
    )


def _process() -> str:
    rows = ["| metric | kind | |", "| --- | --- | --- |"]
    for family in sorted(metrics.ProcessMetrics().registry.collect(), key=lambda each: each.name):
        if family.name != "fedgrpc_live_workers":
            name = family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
            rows.append(f"| `{name}` | {family.type} | {_clean(family.documentation)} |")
    rows += [f"| `{name}` | gauge | {text} (with `--ingest`) |" for name, text, _ in metrics.INGEST_GAUGES]
    return "\n".join(rows) + "\n"


def _table(registry: CollectorRegistry) -> str:
    rows = ["| metric | kind | labels | |", "| --- | --- | --- | --- |"]
    for collector in sorted(_collectors(registry), key=lambda each: str(each._name)):
        kind = str(collector._type)
        name = str(collector._name) + {"counter": "_total", "info": "_info"}.get(kind, "")
        labels = ", ".join(f"`{label}`" for label in collector._labelnames)
        rows.append(f"| `{name}` | {kind} | {labels} | {_clean(collector._documentation)} |")
    return "\n".join(rows) + "\n"


def _collectors(registry: CollectorRegistry) -> list[MetricWrapperBase]:
    found = [each for each in registry._collector_to_names if isinstance(each, MetricWrapperBase)]
    if not found:
        raise RuntimeError(f"no metrics in {inspect.getsourcefile(metrics)}: has prometheus_client changed?")
    return found


def _clean(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()
