"""A client that trains nothing."""

from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from noise.workload import Noise

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """The model plus noise."""
    noise = Noise(int(context.node_config["number"]))
    noise.shift()
    model = {name: Array(noise.add_to(array.numpy())) for name, array in message.content["arrays"].items()}
    content = {"arrays": ArrayRecord(model), "metrics": MetricRecord({"num-examples": 10})}
    return Message(content=RecordDict(content), reply_to=message)
