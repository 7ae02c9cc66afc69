"""The data of a `TorchTask`: none of it, the wrong kind of it, and more of it than there was."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from fedgrpc.datasets.dataset import Examples, LabelledData
from fedgrpc.datasets.digits import load_digits
from fedgrpc.datasets.files import version_of
from fedgrpc.datasets.partition import parse_partition
from fedgrpc.datasets.shares import save_share, write_shares
from fedgrpc.errors import TaskError, UsageError
from fedgrpc.torch.trainer import TorchTrainer
from fedgrpc.trainer import TaskSetup, Trainer, TrainJob, local_examples
from fedgrpc.worker.task_loader import load_trainer
from tests.torch.plain import Plain, X, Y, trainer_of

JOB = TrainJob(max_steps=1)


def share_of(path: Path, train: int, held_out: int) -> Path:
    """A share of the digits with so many examples."""
    digits = load_digits()
    save_share(path, LabelledData(digits.train.take(np.arange(train)), digits.held_out.take(np.arange(held_out))))
    return path


def idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def counts(trainer: Trainer) -> tuple[int, int]:
    """How many examples it trains on, and how many it scores with."""
    weights = trainer.initial_weights()
    scores = trainer.evaluate(weights)
    return trainer.train(weights, JOB).example_count, 0 if scores is None else scores.example_count


def test_without_held_out_examples_it_trains_and_does_not_score(tmp_path: Path) -> None:
    assert counts(load_trainer("fedgrpc.tasks.digits", data=share_of(tmp_path / "a.npz", 30, 0))) == (30, 0)


def test_without_training_examples_it_scores_and_says_how_to_work_with_that(tmp_path: Path) -> None:
    trainer = load_trainer("fedgrpc.tasks.digits", data=share_of(tmp_path / "a.npz", 0, 20))
    scores = trainer.evaluate(trainer.initial_weights())
    assert scores is not None
    assert scores.example_count == 20
    with pytest.raises(UsageError, match=r"no training examples in .*a\.npz.*--role evaluator"):
        trainer.train(trainer.initial_weights(), JOB)


def test_a_share_without_any_example_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^Digits.data\(\) gives no examples in [^\n]*a\.npz[^\n]*$"):
        load_trainer("fedgrpc.tasks.digits", data=share_of(tmp_path / "a.npz", 0, 0))


@pytest.mark.parametrize(("train", "held_out"), [(0, 3), (3, 0), (0, 0)])
def test_empty_idx_files_are_as_shares_are(tmp_path: Path, train: int, held_out: int) -> None:
    for name, count in (("train", train), ("t10k", held_out)):
        idx(tmp_path / f"{name}-images-idx3-ubyte", np.zeros((count, 28, 28)))
        idx(tmp_path / f"{name}-labels-idx1-ubyte", np.zeros(count))
    if not train + held_out:
        with pytest.raises(UsageError, match="gives no examples"):
            load_trainer("fedgrpc.tasks.fashion_mnist", data=tmp_path)
        return
    trainer = load_trainer("fedgrpc.tasks.fashion_mnist", data=tmp_path)
    scores = trainer.evaluate(trainer.initial_weights())
    assert (0 if scores is None else scores.example_count) == held_out


@pytest.mark.parametrize("reference", ["bring_your_own_numpy", "bring_your_own_sklearn"])
def test_the_examples_without_torch_do_without_held_out_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    assert counts(load_trainer(reference, data=share_of(tmp_path / "a.npz", 30, 0))) == (30, 0)


def test_a_share_in_another_order_of_bytes_is_read(tmp_path: Path) -> None:
    images, labels = np.arange(64 * 20).reshape(20, 8, 8).astype(">i2") % 17, (np.arange(20) % 10).astype(">i4")
    both = {"train_inputs": images, "train_labels": labels, "held_out_inputs": images, "held_out_labels": labels}
    np.savez(tmp_path / "a.npz", **both)  # type: ignore[arg-type]
    assert counts(load_trainer("fedgrpc.tasks.digits", data=tmp_path / "a.npz")) == (20, 20)


def test_data_without_held_out_examples_is_shared_out(tmp_path: Path) -> None:
    data = LabelledData(load_digits().train.take(np.arange(40)), Examples(np.zeros((0, 8, 8)), np.zeros(0, int)))
    paths = write_shares(tmp_path, data, parse_partition("iid"), 2, 0)
    assert [counts(load_trainer("fedgrpc.tasks.digits", data=path)) for path in paths] == [(20, 0), (20, 0)]


class Rows(Dataset[Any]):
    def __init__(self, row: Any) -> None:
        self._row = row

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return self._row


@pytest.mark.parametrize(
    ("dataset", "found"),
    [
        (Rows({"pixels": X[0], "class": 1}), "a dict with 'pixels', 'class'"),
        (Rows({"id": "a", "label": 1}), "a dict with 'id', 'label'"),
        (Rows((X[0], X[1], 1)), "a tuple of 3"),
        (TensorDataset(X, X, Y), "a tuple of 3"),
        (TensorDataset(X), "a tuple of 1"),
        ([X[0], X[1]], "a Tensor"),
        (Rows("text"), "a str"),
        (Rows(("text", 1)), "the input of the first one to train on is a str"),
        (Rows(({"id": "a"}, 1)), "the input of the first one to train on is a dict"),
        (Rows((X[0], None)), "the target of the first one to train on is a NoneType"),
        (Rows((object(), 1)), "the input of the first one to train on is a object"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_items_that_are_no_input_and_target_are_told_when_the_task_is_built(dataset: Any, found: str) -> None:
    for purpose, data in {"train on": (dataset, None), "score with": (TensorDataset(X, Y), dataset)}.items():
        bent = type("Bent", (Plain,), {"data": lambda *_, data=data: data})
        with pytest.raises(TaskError) as caught:
            trainer_of(bent)
        text = str(caught.value)
        assert "Bent.data() must give items (input, target)" in text
        assert found.replace("train on", purpose) in text
        assert "\n" not in text


@pytest.mark.parametrize("row", [(X[0], 1), [X[0], Y[0]], (X[0].numpy(), np.int64(1)), (1.5, 0)], ids=str)
def test_items_of_tensors_arrays_and_numbers_are_taken(row: Any) -> None:
    class Taken(Plain):
        def model(self) -> nn.Module:
            return nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (-1, 1)), nn.Linear(1, 2))

        def data(self, path: Path | None) -> tuple[Dataset[Any], Dataset[Any] | None]:
            return Rows(row), None

    trainer_of(Taken)


def test_targets_of_any_shape_can_be_shared_out_without_labels() -> None:
    class Sequences(Plain):
        def data(self, path: Path | None) -> tuple[Dataset[Any], Dataset[Any] | None]:
            return TensorDataset(X, torch.zeros(90, 4, dtype=torch.int64)), Rows((X[0], X[0]))

    assert trainer_of(Sequences, partition="iid", part="1/3")
    with pytest.raises(UsageError, match=r"one label per example.*iid"):
        trainer_of(Sequences, partition="dirichlet:1", part="1/3")


def test_data_is_read_again_once_its_file_has_been_replaced(tmp_path: Path) -> None:
    path = share_of(tmp_path / "a.npz", 100, 50)
    trainer = load_trainer("fedgrpc.tasks.digits", data=path)
    assert counts(trainer) == (100, 50)
    share_of(path, 600, 60)
    assert counts(trainer) == (600, 60)


def test_a_trainer_counts_its_examples_and_tells_other_data_from_the_same(tmp_path: Path) -> None:
    path = share_of(tmp_path / "a.npz", 100, 50)
    trainer = load_trainer("fedgrpc.tasks.digits", data=path)
    before = local_examples(trainer)
    assert before is not None
    assert before == local_examples(trainer)
    share_of(path, 600, 60)
    after = local_examples(trainer)
    assert after is not None
    assert (after.count, after.new_since(before)) == (600, 500)


def test_data_that_cannot_be_read_again_fails_the_task_until_it_can(tmp_path: Path) -> None:
    path = share_of(tmp_path / "a.npz", 100, 50)
    trainer = load_trainer("fedgrpc.tasks.digits", data=path)
    path.unlink()
    for _ in range(2):
        with pytest.raises(UsageError, match=r"a\.npz"):
            trainer.train(trainer.initial_weights(), JOB)
    share_of(path, 200, 50)
    assert counts(trainer) == (200, 50)


def test_a_task_says_itself_when_its_data_has_changed() -> None:
    class Gathering(Plain):
        gathered = 20
        reads = 0

        def data(self, path: Path | None) -> tuple[Dataset[Any], Dataset[Any] | None]:
            self.reads += 1
            return TensorDataset(X[: self.gathered], Y[: self.gathered]), None

        def data_version(self, path: Path | None) -> object:
            return self.gathered

    task = Gathering()
    trainer = TorchTrainer(task, TaskSetup(device="cpu"))
    assert [counts(trainer), counts(trainer), task.reads] == [(20, 0), (20, 0), 1]
    task.gathered = 30
    assert [counts(trainer), counts(trainer), task.reads] == [(30, 0), (30, 0), 2]


def test_a_version_of_files_changes_with_each_of_them(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "cats").mkdir(parents=True)
    seen = [version_of(folder)]

    def changed() -> bool:
        seen.append(version_of(folder))
        assert version_of(folder) == seen[-1]
        return seen.count(seen[-1]) == 1

    (folder / "cats" / "1.png").write_bytes(b"1")
    assert changed()
    (folder / "cats" / "1.png").write_bytes(b"12")
    assert changed()
    os.utime(folder / "cats" / "1.png", ns=(1, 1))
    assert changed()
    (folder / "cats" / "2.png").write_bytes(gzip.compress(b""))
    assert changed()
    (folder / "cats" / "1.png").unlink()
    assert changed()
    (folder / "cats" / "all").symlink_to(folder)
    assert changed()
    (tmp_path / "dogs").mkdir()
    (folder / "dogs").symlink_to(tmp_path / "dogs")
    assert changed()
    (tmp_path / "dogs" / "1.png").write_bytes(b"1")
    assert changed()
    assert version_of(tmp_path / "nowhere") == version_of(tmp_path / "elsewhere")


def test_what_fails_within_torch_is_told_with_what_the_model_was_given() -> None:
    class WrongShape(Plain):
        def model(self) -> nn.Module:
            return nn.Linear(3, 2)

    trainer = trainer_of(WrongShape)
    with pytest.raises(RuntimeError) as caught:
        trainer.train(trainer.initial_weights(), JOB)
    assert caught.value.__notes__ == ["inputs float32[10, 4], targets int64[10]"]
    with pytest.raises(RuntimeError) as caught:
        trainer.evaluate(trainer.initial_weights())
    assert caught.value.__notes__ == ["inputs float32[20, 4], targets int64[20]"]
