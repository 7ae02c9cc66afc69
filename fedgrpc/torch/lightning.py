"""Lightning modules as they are: a learning task that calls their steps, without Lightning's `Trainer`.

    class Task(LightningTask):
        def model(self):
            return MyLightningModule()

        def data(self, path):
            return train_loader, validation_loader

The rule: the module's own `training_step`, `validation_step` and `configure_optimizers` count. What it logs in
validation are its scores: numbers are averaged over examples, metrics of torchmetrics are of the whole set. A
scheduler counts rounds. Callbacks and the hooks named `on_...` are Lightning's `Trainer`'s, and are not called.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fedgrpc.errors import UsageError
from fedgrpc.torch.optimizer import Optimizer, in_round
from fedgrpc.torch.task import TorchTask

Log = Callable[..., None]


class LightningTask(TorchTask):
    """Learning task whose `model` returns a `LightningModule`. Plans' learning rates do not count."""

    # By the names under which they are logged, while an evaluation lasts.
    _metrics: dict[str, Any] | None = None

    def inputs_and_targets(self, batch: Any) -> tuple[Any, Any]:
        """Leave the batch to the module: both are the batch."""
        return batch, batch

    def training_step(self, model: Any, inputs: Any, targets: Any) -> Tensor:
        """Return the loss of the module's `training_step`. Raises `UsageError` for manual optimization."""
        if not model.automatic_optimization:
            raise UsageError(f"{type(model).__name__} optimizes by itself, which only Lightning's Trainer knows")
        with logging_to(model, lambda name, value, *_, **__: None):
            loss = _called(model.training_step, inputs)
        found: Tensor = loss["loss"] if isinstance(loss, Mapping) else loss
        return found

    def scoring_step(self, model: Any, inputs: Any, targets: Any) -> Mapping[str, Any]:
        """Return the numbers that the module's `validation_step` logs."""
        numbers: dict[str, Any] = {}
        metrics = self._metrics = {} if self._metrics is None else self._metrics

        def log(name: str, value: Any, *_: Any, **__: Any) -> None:
            (metrics if hasattr(value, "compute") else numbers)[name] = value

        with logging_to(model, log):
            _called(model.validation_step, inputs)
        return numbers

    def scoring_end(self, model: Any) -> Mapping[str, float]:
        """Return the metrics of torchmetrics over all that was scored."""
        metrics, self._metrics = self._metrics or {}, None
        found = {name: float(metric.compute()) for name, metric in metrics.items()}
        for metric in metrics.values():
            metric.reset()
        return found

    def optimizer_for(self, model: Any, round: int) -> Optimizer:
        """Return what the module's `configure_optimizers` gives, with the scheduler's rate of that round."""
        optimizer, scheduler = _configured(model.configure_optimizers())
        optimizer = in_round(optimizer, scheduler, round) if scheduler is not None else optimizer
        found: Optimizer = optimizer
        return found


@contextmanager
def logging_to(model: nn.Module, log: Log) -> Iterator[None]:
    """Let the module's `self.log` call `log` within the block: without a Trainer it would only warn."""
    model.__dict__["log"] = log
    try:
        yield
    finally:
        del model.__dict__["log"]


def _called(step: Callable[..., Any], batch: Any) -> Any:
    return step(batch, 0) if len(inspect.signature(step).parameters) > 1 else step(batch)


def _configured(given: Any) -> tuple[Any, Any]:
    """Return the one optimizer and scheduler (or None). Raises `UsageError` for several."""
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], list):
        given = {"optimizer": given[0], "lr_scheduler": given[1]}
    if not isinstance(given, Mapping):
        given = {"optimizer": given}
    optimizer, scheduler = _only(given["optimizer"]), _only(given.get("lr_scheduler"))
    return optimizer, scheduler["scheduler"] if isinstance(scheduler, Mapping) else scheduler


def _only(given: Any) -> Any:
    found = list(given) if isinstance(given, list | tuple) else [given]
    if len(found) > 1:
        raise UsageError("configure_optimizers() must give one optimizer and one scheduler at most")
    return found[0] if found else None
