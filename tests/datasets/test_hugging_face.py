"""Data sets of Hugging Face's library, from a folder on the disk."""

import sys

import numpy as np
import pytest

from fedgrpc.datasets.hugging_face import load_hugging_face
from fedgrpc.datasets.partition import ByGroup
from fedgrpc.datasets.shares import take_share
from fedgrpc.errors import UsageError


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A folder of `save_to_disk` with images, labels and writers."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets", reason="needs the extra fedgrpc[datasets]")
    image = pytest.importorskip("PIL.Image")
    pictures = [image.fromarray(np.full((4, 4), number, np.uint8)) for number in range(12)]
    split = datasets.Dataset.from_dict(
        {"image": pictures, "label": [n % 3 for n in range(12)], "writer": [f"w{n // 3}" for n in range(12)]},
        features=datasets.Features(
            {"image": datasets.Image(), "label": datasets.Value("int64"), "writer": datasets.Value("string")}
        ),
    )
    datasets.DatasetDict({"train": split}).save_to_disk(str(tmp_path / "set"))
    return str(tmp_path / "set")


@pytest.mark.extras
def test_images_labels_and_writers_are_read(saved):
    data = load_hugging_face(saved, inputs="image", labels="label", groups="writer")
    assert data.train.inputs.shape == (12, 4, 4)
    assert data.train.inputs[5, 0, 0] == 5
    assert data.train.labels.tolist() == [n % 3 for n in range(12)]
    assert len(data.held_out) == 0
    share = take_share(data, ByGroup(), 0, 4, 0)
    assert len(share.train) == 3
    assert len(set(share.train.groups)) == 1


@pytest.mark.extras
def test_a_missing_column_is_named(saved):
    with pytest.raises(UsageError, match="no column 'picture'; it has image"):
        load_hugging_face(saved, inputs="picture", labels="label")


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="fedgrpc\\[datasets\\]"):
        load_hugging_face("anything", inputs="a", labels="b")
