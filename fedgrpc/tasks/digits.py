"""scikit-learn's digits, 8x8 pixels: needs no download, and learns in seconds. `--model mlp`."""

from __future__ import annotations

from fedgrpc.tasks.images import ImageTask


class Digits(ImageTask):
    """1442 images to train on, 355 held out."""

    dataset = "digits"
    image_size = 8
    in_channels = 1
    brightest = 16
    learning_rate = 0.1
    batch_size = 16

    def __init__(self, model: str = "mlp") -> None:
        super().__init__(model)
