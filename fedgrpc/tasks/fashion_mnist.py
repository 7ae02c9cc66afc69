"""Fashion-MNIST (arXiv 1708.07747), with the settings of NIID-Bench (arXiv 2102.02079). `--model lenet`."""

from __future__ import annotations

from fedgrpc.tasks.images import ImageTask


class FashionMnist(ImageTask):
    """60000 images of 28x28 to train on, 10000 held out; by default from Debian's dataset-fashion-mnist."""

    dataset = "fashion_mnist"
    image_size = 28
    in_channels = 1
    learning_rate = 0.01
    weight_decay = 1e-5
    batch_size = 64

    def __init__(self, model: str = "lenet") -> None:
        super().__init__(model)
