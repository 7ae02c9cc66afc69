"""A LightningModule and its DataLoaders as they are. Here: which digit is it?

fedgrpc worker --aggregator HOST:PORT --name pi-1 --task lightning_module:Task --data shares/part-1-of-5.npz
pip install lightning
"""

import lightning
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassF1Score

from fedgrpc.datasets.shares import load_named
from fedgrpc.torch.lightning import LightningTask


class Digits(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.f1 = MulticlassF1Score(num_classes=10)

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        loss = functional.cross_entropy(self.layers(inputs), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        inputs, labels = batch
        outputs = self.layers(inputs)
        self.f1(outputs, labels)
        self.log("f1", self.f1)
        self.log_dict(
            {
                "loss": functional.cross_entropy(outputs, labels),
                "accuracy": (outputs.argmax(1) == labels).float().mean(),
            }
        )

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.002)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.5)}


class Task(LightningTask):
    def model(self):
        return Digits()

    def data(self, path):
        digits = load_named("digits", path)
        train, held_out = (
            TensorDataset(pixels(part), torch.from_numpy(part.labels)) for part in (digits.train, digits.held_out)
        )
        return DataLoader(train, batch_size=32, shuffle=True), DataLoader(held_out, batch_size=256)


def pixels(part):
    return torch.tensor(part.inputs.reshape(-1, 64) / 16, dtype=torch.float32)
