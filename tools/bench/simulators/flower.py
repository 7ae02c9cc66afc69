"""The workload in Flower's simulation with Ray. Run as a script: ROUNDS.

Its Python has flwr[simulation] and torch.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch.nn import functional
from workload import BATCH, CLIENTS, COHORT, EXAMPLES, LEARNING_RATE, MOMENTUM, LeNet, tell, training_data

client_app = ClientApp()
server_app = ServerApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Train the model that came, one batch at a time."""
    torch.set_num_threads(1)
    client, (inputs, targets) = int(context.node_config["partition-id"]), training_data()
    share = slice(client * EXAMPLES, (client + 1) * EXAMPLES)
    inputs, targets = inputs[share], targets[share]
    model = LeNet()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=MOMENTUM)
    for batch in torch.randperm(EXAMPLES).split(BATCH):
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs[batch].float().div_(255)), targets[batch]).backward()
        optimizer.step()
    content = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": EXAMPLES})}
    return Message(content=RecordDict(content), reply_to=message)


class Told(FedAvg):
    """Says when a round is over."""

    def aggregate_train(self, *args: Any, **settings: Any) -> Any:
        """See Flower."""
        mean = super().aggregate_train(*args, **settings)
        tell(COHORT)
        return mean


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    """Play the rounds, without evaluation."""
    strategy = Told(
        fraction_train=COHORT / CLIENTS,
        fraction_evaluate=0.0,
        min_train_nodes=COHORT,
        min_available_nodes=CLIENTS,
    )
    strategy.start(grid=grid, initial_arrays=ArrayRecord(LeNet().state_dict()), num_rounds=int(sys.argv[1]))


if __name__ == "__main__":
    run_simulation(
        server_app,
        client_app,
        CLIENTS,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": 1, "include_dashboard": False},
        },
    )
