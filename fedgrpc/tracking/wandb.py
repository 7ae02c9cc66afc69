"""Figures as a run of Weights & Biases, offline unless `WANDB_MODE` says else: `wandb sync` sends it later."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from fedgrpc.errors import ExtraMissing


class WeightsAndBiases:
    """A `Tracker`. `target` is the project; files lie in `WANDB_DIR`, or in the working folder."""

    def __init__(self, target: str) -> None:
        """Raises `UsageError` without the library."""
        try:
            import wandb
        except ImportError as error:
            raise ExtraMissing.of("the tracker wandb", "wandb", error) from None
        self._library: Any = wandb
        self._project = target
        self._run: Any = None

    def begin(self, run: str, settings: Mapping[str, str]) -> None:
        """Open a run with the settings as its configuration."""
        mode = os.environ.get("WANDB_MODE", "offline")
        # Not `silent`: with it, version 0.31 writes no data.
        quiet = self._library.Settings(quiet=True, console="off")
        self._run = self._library.init(
            project=self._project, name=run, config=dict(settings), mode=mode, settings=quiet
        )
        self._run.define_metric("*", step_metric="round")

    def log(self, step: int, values: Mapping[str, float], at_s: float) -> None:
        """Log figures by round: scores come after the round they belong to, which its own step would refuse."""
        self._run.log({**values, "round": step, "at_s": at_s})

    def end(self) -> None:
        """Finish the run."""
        if self._run is not None:
            self._run.finish()
