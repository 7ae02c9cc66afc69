"""FedAvg as Flower has it, with a mark before each round's first message and after its mean."""

import time
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from noise.workload import initial_model

app = ServerApp()


class MarkedFedAvg(FedAvg):
    """Appends a line to a file when a round begins and when it ends."""

    def __init__(self, marks: Path, **settings: Any) -> None:
        super().__init__(**settings)
        self._marks = marks

    def configure_train(self, *args: Any, **settings: Any) -> Any:
        self._mark("begin")
        return super().configure_train(*args, **settings)

    def aggregate_train(self, *args: Any, **settings: Any) -> Any:
        mean = super().aggregate_train(*args, **settings)
        self._mark("end")
        return mean

    def _mark(self, what: str) -> None:
        with self._marks.open("a") as file:
            file.write(f"{what} {time.time()}\n")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Rounds of all clients, without evaluation."""
    config = context.run_config
    clients = config["clients"]
    strategy = MarkedFedAvg(
        Path(config["marks"]),
        fraction_train=1.0,
        fraction_evaluate=0.0,
        min_train_nodes=clients,
        min_available_nodes=clients,
    )
    model = {name: Array(values) for name, values in initial_model(config["width"]).items()}
    strategy.start(grid=grid, initial_arrays=ArrayRecord(model), num_rounds=config["rounds"])
