"""Figures as a run of MLflow, in a folder or on a server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from fedgrpc.errors import ExtraMissing

_EXPERIMENT: Final = "fedgrpc"
_TAG: Final = "fedgrpc.run"
_MOST_CHARS: Final = 500


class MLflow:
    """A `Tracker`. `target` is a tracking URI or the path of an SQLite file; a run continues after a restart."""

    def __init__(self, target: str) -> None:
        """Raises `UsageError` without the library."""
        try:
            from mlflow import MlflowClient
        except ImportError as error:
            raise ExtraMissing.of("the tracker mlflow", "mlflow", error) from None
        self._client: Any = MlflowClient(tracking_uri=target if "://" in target else f"sqlite:///{target}")
        self._id = ""

    def begin(self, run: str, settings: Mapping[str, str]) -> None:
        """Find the run of that name that has not ended, or make one with the settings as parameters."""
        found = self._client.get_experiment_by_name(_EXPERIMENT)
        experiment = found.experiment_id if found else self._client.create_experiment(_EXPERIMENT)
        named = self._client.search_runs(
            [experiment], f"tags.`{_TAG}` = '{run}' and attributes.status = 'RUNNING'"
        )
        if named:
            self._id = named[0].info.run_id
            return
        self._id = self._client.create_run(experiment, tags={_TAG: run}, run_name=run).info.run_id
        for name, value in settings.items():
            self._client.log_param(self._id, name, value[:_MOST_CHARS])

    def log(self, step: int, values: Mapping[str, float], at_s: float) -> None:
        """Log a metric for each figure."""
        from mlflow.entities import Metric

        self._client.log_batch(self._id, [Metric(n, value, int(at_s * 1000), step) for n, value in values.items()])

    def end(self) -> None:
        """End the run."""
        if self._id:
            self._client.set_terminated(self._id)
