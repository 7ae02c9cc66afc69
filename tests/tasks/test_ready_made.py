"""The ready-made tasks and the examples, run as a worker runs them."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fedgrpc.datasets.cifar10 import BINARY_ARCHIVE
from fedgrpc.errors import UsageError
from fedgrpc.tasks.cifar10 import _shifted_and_mirrored
from fedgrpc.tasks.pooled import train_pooled
from fedgrpc.trainer import Cancelled, Trainer, TrainJob, Weights
from fedgrpc.worker.task_loader import load_trainer

ROOT = Path(__file__).parents[2]
EXAMPLES = ["bring_your_own_torch", "bring_your_own_numpy", "bring_your_own_sklearn"]


def accuracy(trainer: Trainer, weights: Weights) -> float:
    result = trainer.evaluate(weights)
    assert result is not None
    return result.metrics["accuracy"]


def averaged_rounds(trainers: list[Trainer], rounds: int, epochs: float) -> Weights:
    """Federated averaging (arXiv 1602.05629) in a dumb loop, to try tasks without a network."""
    weights = trainers[0].initial_weights()
    for number in range(rounds):
        job = TrainJob(epochs=epochs, round=number)
        results = [trainer.train(weights, job) for trainer in trainers]
        total = sum(result.example_count for result in results)
        shares = [result.example_count / total for result in results]
        weights = {
            name: np.sum([r.weights[name] * share for r, share in zip(results, shares, strict=True)], axis=0)
            for name in weights
        }
        weights = {name: array.astype(results[0].weights[name].dtype) for name, array in weights.items()}
    return weights


def test_digits_reach_95_percent_on_five_uneven_workers_and_come_near_pooled_training() -> None:
    parts = [
        load_trainer("fedgrpc.tasks.digits", partition="dirichlet:0.5", part=f"{part}/5") for part in range(1, 6)
    ]
    everything = load_trainer("fedgrpc.tasks.digits")
    federated = accuracy(everything, averaged_rounds(parts, rounds=12, epochs=3))
    *_, pooled = train_pooled(everything, TrainJob(epochs=3), rounds=12)
    assert pooled is not None
    assert federated >= 0.95
    assert federated >= pooled.metrics["accuracy"] - 0.02


def test_fashion_mnist_learns_from_a_share(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(300) % 10
    images = rng.integers(0, 40, (300, 28, 28), dtype=np.uint8)
    for index, label in enumerate(labels):
        images[index, 2 * label : 2 * label + 6] = 220
    path = tmp_path / "share.npz"
    np.savez(path, train_inputs=images[:200], train_labels=labels[:200], held_out_inputs=images[200:],
             held_out_labels=labels[200:])  # fmt: skip
    trainer = load_trainer("fedgrpc.tasks.fashion_mnist", data=path)
    trained = trainer.train(trainer.initial_weights(), TrainJob(epochs=25, learning_rate=0.05, batch_size=20))
    assert accuracy(trainer, trained.weights) > 0.9
    assert sum(array.size for array in trained.weights.values()) == 44426


def test_cifar10_trains_from_an_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    with tarfile.open(tmp_path / BINARY_ARCHIVE, "w:gz") as tar:
        for name in ("data_batch_1.bin", "test_batch.bin"):
            records = rng.integers(0, 10, (40, 3073), dtype=np.uint8)
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = records.nbytes
            tar.addfile(info, io.BytesIO(records.tobytes()))
    for model in ("net", "resnet18"):
        trainer = load_trainer("fedgrpc.tasks.cifar10", data=tmp_path, model=model)
        start = trainer.initial_weights()
        result = trainer.train(start, TrainJob(max_steps=1, batch_size=8))
        assert result.example_count == 40
        assert not np.array_equal(result.weights["fc1.weight" if model == "net" else "fc.weight"],
                                  start["fc1.weight" if model == "net" else "fc.weight"])  # fmt: skip
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    trainer = load_trainer("cifar10_net", data=tmp_path)
    result = trainer.train(trainer.initial_weights(), TrainJob(max_steps=1, batch_size=8))
    assert result.example_count == 40
    assert trainer.evaluate(result.weights) is not None


def test_augmentation_only_shifts_and_mirrors_each_image_by_itself() -> None:
    images = torch.zeros(64, 2, 32, 32)
    images[:, 0, 16, 8] = 1
    images[:, 1, 16, 8] = 2
    moved = _shifted_and_mirrored(images)
    places = [tuple(image[0].nonzero()[0].tolist()) for image in moved]
    assert moved.shape == images.shape
    assert set(moved.sum(dim=(1, 2, 3)).tolist()) == {3.0}
    assert torch.equal(moved[:, 1], 2 * moved[:, 0])
    assert {row for row, _ in places} == set(range(12, 21))
    assert {column for _, column in places} <= {*range(4, 13), *range(19, 28)}
    assert len(set(places)) > 20


def test_augmentation_is_off_when_scoring_and_when_asked() -> None:
    from fedgrpc.tasks.cifar10 import Cifar10

    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    scored = Cifar10().prepare(pixels, False)
    assert torch.equal(scored, Cifar10(augment=False).prepare(pixels, True))
    assert not torch.equal(scored, Cifar10().prepare(pixels, True))
    assert pixels.dtype == torch.uint8


def test_a_wrong_model_or_missing_data_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no model 'alexnet'"):
        load_trainer("fedgrpc.tasks.digits", model="alexnet")
    with pytest.raises(UsageError, match="--data names the folder"):
        load_trainer("fedgrpc.tasks.fashion_mnist", data=tmp_path / "gone")
    with pytest.raises(UsageError, match="needs --data"):
        load_trainer("fedgrpc.tasks.cifar10")


def test_a_share_of_another_data_set_is_a_usage_error(tmp_path: Path) -> None:
    images, labels = np.zeros((20, 5, 5), np.uint8), np.arange(20) % 10
    path = tmp_path / "share.npz"
    np.savez(path, train_inputs=images, train_labels=labels, held_out_inputs=images, held_out_labels=labels)
    with pytest.raises(UsageError, match="not digits's"):
        load_trainer("fedgrpc.tasks.digits", data=path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"train_inputs": np.zeros((20, 28, 28), np.float32)},
            "float32 pixels, 0 to 0; fashion_mnist's are whole",
        ),
        ({"train_inputs": np.full((20, 28, 28), 300)}, "int64 pixels, 300 to 300; .* 0 to 255"),
        ({"train_labels": np.arange(20)}, "labels 0 to 19; fashion_mnist's are 0 to 9"),
        ({"held_out_labels": np.arange(20) % 10 - 1}, "labels -1 to 8"),
        ({"train_labels": np.eye(20)}, "labels are float64.20, 20., not one whole number each"),
        ({"train_labels": np.zeros(19, np.int64)}, "not one label for each input"),
        ({"train_inputs": np.array([object()] * 20)}, "no .npz file of plain arrays"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_a_share_of_wrong_values_is_a_usage_error(
    tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    images, labels = np.zeros((20, 28, 28), np.uint8), np.arange(20) % 10
    right = {"train_inputs": images, "train_labels": labels, "held_out_inputs": images, "held_out_labels": labels}
    np.savez(tmp_path / "share.npz", **{**right, **arrays})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=message):
        load_trainer("fedgrpc.tasks.fashion_mnist", data=tmp_path / "share.npz")


def test_pooled_training_prints_a_line_per_round() -> None:
    command = [sys.executable, "-m", "fedgrpc.tasks.pooled", "--rounds", "2", "--epochs", "0.5"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2]
    assert set(json.loads(lines[0])["metrics"]) == {"loss", "accuracy"}


@pytest.fixture(params=EXAMPLES)
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    torch.manual_seed(0)
    return load_trainer(request.param)


def test_every_example_learns(example: Trainer) -> None:
    start = example.initial_weights()
    trained = example.train(start, TrainJob(epochs=50)).weights
    assert accuracy(example, trained) > 0.85 > accuracy(example, start)


def test_every_example_averages(example: Trainer) -> None:
    assert accuracy(example, averaged_rounds([example, example], rounds=2, epochs=25)) > 0.85


def test_every_example_cancels_between_batches(example: Trainer) -> None:
    steps: list[int] = []
    with pytest.raises(Cancelled):
        example.train(
            example.initial_weights(),
            TrainJob(epochs=9, stop=lambda: len(steps) >= 2, report=lambda done, total: steps.append(done)),
        )
    assert steps == [1, 2]


def test_every_example_leaves_the_weights_it_is_given_alone(example: Trainer) -> None:
    start = example.initial_weights()
    kept = {name: array.copy() for name, array in start.items()}
    example.train(start, TrainJob())
    assert all(np.array_equal(kept[name], start[name]) for name in start)


def test_the_torch_example_is_25_lines_without_a_federated_word() -> None:
    lines = (ROOT / "examples" / "bring_your_own_torch.py").read_text().split('"""', 2)[2].splitlines()
    code = [line for line in lines if line.strip()]
    assert len(code) <= 25
    assert not any(word in " ".join(code) for word in ("round", "client", "aggregat", "federat", "worker"))


def test_pointnet_tells_solids_apart_after_a_few_rounds() -> None:
    torch.set_num_threads(1)
    trainer = load_trainer("fedgrpc.tasks.shapes", options={"count": "500", "points": "32"})
    assert accuracy(trainer, averaged_rounds([trainer], 2, 3.0)) > 0.5


def test_shapes_take_no_data() -> None:
    with pytest.raises(UsageError, match="take no --data"):
        load_trainer("fedgrpc.tasks.shapes", data=ROOT)
