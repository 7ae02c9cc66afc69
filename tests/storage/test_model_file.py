"""Model files against the safetensors package, both ways, and against everything that is no model file."""

import contextlib
import json
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from fedgrpc.codec.layout import TensorRole, TensorSpec, layout_of
from fedgrpc.errors import StorageError, UsageError
from fedgrpc.storage import model_header
from fedgrpc.storage.model_file import ModelFile, ModelWriter, write_model

DTYPES = ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]
TENSORS = {
    **{dtype: (np.arange(6) % 2).astype(dtype).reshape(2, 3) for dtype in DTYPES},
    "bfloat16": np.arange(5).astype(ml_dtypes.bfloat16),
    "scalar": np.array(7, np.int64),
    "empty": np.zeros((0, 3), np.float32),
    "naïve/名前 \n": np.ones(3, np.float32),
}


def write(path, tensors):
    return write_model(path, layout_of(tensors), tensors.values())


def read(path):
    model = ModelFile.open(path)
    return {spec.name: model.tensor(index) for index, spec in enumerate(model.layout)}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, values in right.items():
        assert (left[name].dtype, left[name].shape) == (values.dtype, values.shape)
        np.testing.assert_array_equal(left[name], values)


def test_the_safetensors_package_reads_what_is_written_here(tmp_path):
    tensors = {name: values for name, values in TENSORS.items() if name != "bfloat16"}
    write(tmp_path / "m.safetensors", tensors)
    assert_same(load_file(tmp_path / "m.safetensors"), tensors)


def test_a_run_named_as_a_tensor_ties_nothing_in_a_model_of_thousands_of_tensors(tmp_path):
    tensors = {f"layers.{number}.weight": np.ones(1, np.float32) for number in range(1000)} | {"w": np.ones(1)}
    layout = layout_of(tensors)
    write_model(tmp_path / "m.safetensors", layout, tensors.values(), {"run": "w"})
    assert ModelFile.open(tmp_path / "m.safetensors").layout == layout


def test_versions_of_a_model_differ_in_their_metadata_and_their_tensors_are_parsed_once(tmp_path):
    layout = (TensorSpec("w", "float32", (2,), TensorRole.STATISTIC, ("v",)), TensorSpec("b", "float32", (1,)))
    values, found = [np.ones(2, np.float32), np.zeros(1, np.float32)], []
    # A name of a tensor among the metadata ties nothing.
    for number, about in enumerate(({"round": "1"}, {"round": "2", "base_scores": '{"loss": 1.5}'}, {"run": "b"})):
        path = tmp_path / f"{number}.safetensors"
        write_model(path, layout, values, about)
        misses = model_header._parse_own.cache_info().misses
        found.append(ModelFile.open(path))
        assert model_header._parse_own.cache_info().misses - misses == (number == 0)
        assert {key: found[-1].about(key) for key in about} == about
    assert [model.layout for model in found] == 3 * [layout]
    assert all(model.as_written for model in found)


def test_what_the_safetensors_package_writes_is_read_here(tmp_path):
    tensors = {name: values for name, values in TENSORS.items() if name != "bfloat16"}
    save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt", "author": "someone"})
    assert_same(read(tmp_path / "m.safetensors"), tensors)


def test_torch_reads_bfloat16_as_it_was_written(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load_torch

    write(tmp_path / "m.safetensors", TENSORS)
    loaded = load_torch(tmp_path / "m.safetensors")["bfloat16"]
    assert loaded.dtype == torch.bfloat16
    np.testing.assert_array_equal(loaded.float().numpy(), np.arange(5))
    assert_same(read(tmp_path / "m.safetensors"), TENSORS)


def test_the_order_of_the_tensors_is_kept(tmp_path):
    tensors = {name: np.zeros(2, np.float32) for name in ("z", "a", "m")}
    write(tmp_path / "m.safetensors", tensors)
    assert [spec.name for spec in ModelFile.open(tmp_path / "m.safetensors").layout] == ["z", "a", "m"]


def test_the_digest_is_the_files_and_changes_with_every_byte_of_it(tmp_path):
    path = tmp_path / "m.safetensors"
    digest = write(path, {"w": np.ones(3, np.float32)})
    good = path.read_bytes()
    assert ModelFile.open(path).sha256() == digest
    for at in (-1, -12, good.index(b"format")):
        spoiled = bytearray(good)
        spoiled[at] ^= 1
        path.write_bytes(spoiled)
        assert ModelFile.open(path).sha256() != digest


def test_values_are_cast_to_the_layout(tmp_path):
    layout = layout_of({"w": np.zeros(2, np.float32), "n": np.zeros(2, np.int64)})
    write_model(tmp_path / "m.safetensors", layout, [np.array([0.5, 1.5]), np.array([3.0, 4.0])])
    assert_same(read(tmp_path / "m.safetensors"), {"w": np.float32([0.5, 1.5]), "n": np.array([3, 4])})


def test_a_tensor_is_found_by_name(tmp_path):
    write(tmp_path / "m.safetensors", TENSORS)
    assert ModelFile.open(tmp_path / "m.safetensors").named("scalar") == 7


def test_versions_of_one_layout_are_told_apart_by_their_digests(tmp_path):
    for number in (1, 2):
        write(tmp_path / str(number), {"w": np.full((2, 3), float(number)), "b": np.zeros(number, np.float32)})
        write(tmp_path / f"{number}-again", {"w": np.full((2, 3), 7.0), "b": np.zeros(number, np.float32)})
    for number in (1, 2):
        model, again = ModelFile.open(tmp_path / str(number)), ModelFile.open(tmp_path / f"{number}-again")
        assert [spec.shape for spec in again.layout] == [(2, 3), (number,)]
        assert (again.layout, again.starts) == (model.layout, model.starts)
        assert model.sums.sha256 == model.computed_sha256() != again.sums.sha256 == again.computed_sha256()
        assert model.sums.digest != again.sums.digest
        np.testing.assert_array_equal(again.tensor(0), np.full((2, 3), 7.0))


def test_nothing_is_there_until_all_of_it_is(tmp_path):
    path = tmp_path / "m.safetensors"
    write(path, {"w": np.ones(3, np.float32)})
    before = path.read_bytes()
    layout = layout_of({"a": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)})
    with ModelWriter(path, layout) as writer:
        writer.add(np.zeros(2))
        assert path.read_bytes() == before
        with pytest.raises(ValueError, match="'b' was not written"):
            writer.finish()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_elements_of_several_tensors_of_a_dtype_may_come_together(tmp_path):
    tensors = {"a": np.arange(3.0), "none": np.empty((2, 0)), "b": np.arange(4.0).reshape(2, 2), "n": np.array(3)}
    together = np.concatenate([values.reshape(-1) for name, values in tensors.items() if name != "n"])
    write(tmp_path / "apart.safetensors", tensors)
    for cut in (1, 3, 5, 7):
        with ModelWriter(tmp_path / "together.safetensors", layout_of(tensors)) as writer:
            for piece in (together[:cut], together[cut:], tensors["n"]):
                writer.add(piece)
            writer.finish()
        assert (tmp_path / "together.safetensors").read_bytes() == (tmp_path / "apart.safetensors").read_bytes()
    with ModelWriter(tmp_path / "m.safetensors", layout_of(tensors)) as writer:
        writer.add(together)
        with pytest.raises(ValueError, match="'n' was not written"):
            writer.finish()
    with (
        ModelWriter(tmp_path / "m.safetensors", layout_of(tensors)) as writer,
        pytest.raises(ValueError, match="'n' is int64"),
    ):
        writer.add(np.zeros(8))


def test_a_disk_that_does_not_take_it_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match=r"cannot write the model .*: No such file"):
        write(tmp_path / "gone" / "m.safetensors", {"w": np.ones(3, np.float32)})


def test_a_file_that_shrinks_or_goes_under_its_reader_is_a_storage_error(tmp_path):
    path = tmp_path / "m.safetensors"
    write(path, {"w": np.ones(3, np.float32)})
    model = ModelFile.open(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(StorageError, match="is cut short"):
        model.tensor(0)
    path.unlink()
    for call in (model.sha256, lambda: model.tensor(0)):
        with pytest.raises(StorageError, match="cannot read the model"):
            call()


def entry(dtype="F32", shape=(3,), offsets=(0, 12)):
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


BAD_HEADERS = {
    "a list": [1, 2],
    "no JSON": b"{",
    "not UTF-8": b"\xff\xfe",
    "nested for ever": b"[" * 100_000,
    "an unknown dtype": entry(dtype="F8_E4M3"),
    "a dtype that is no text": entry(dtype=["F32"]),
    "a negative shape": entry(shape=(-1, -3)),
    "a shape of fractions": entry(shape=(3.0,)),
    "a shape of truths": entry(shape=(True, 3)),
    "a shape of texts": entry(shape=("3",)),
    "no shape": {"w": {"dtype": "F32", "data_offsets": (0, 12)}},
    "a wrong size": entry(shape=(4,)),
    "a hole": entry(offsets=(4, 16)),
    "an end before the beginning": entry(offsets=(12, 0)),
    "places that are no numbers": entry(offsets=("0", "12")),
    "one place": entry(offsets=(0,)),
    "an overlap": {**entry(), "v": {"dtype": "F32", "shape": (3,), "data_offsets": (0, 12)}},
    "an endless tensor": entry(shape=(1 << 40, 1 << 40), offsets=(0, 1 << 82)),
    "too many dimensions": entry(shape=(1,) * 17, offsets=(0, 4)),
    "a tensor without a name": {"": entry()["w"]},
    "an entry that is a number": {"w": 3},
}


@pytest.mark.parametrize("what", BAD_HEADERS)
def test_a_header_that_cannot_be_is_a_usage_error_of_one_line(tmp_path, what):
    header = BAD_HEADERS[what]
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 12)
    with pytest.raises(UsageError, match="is not a safetensors file that fedgrpc can use") as caught:
        ModelFile.open(path)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 7, b"\xff" * 8, struct.pack("<Q", 1 << 62), b"a pickle, not a model"]
)
def test_a_file_that_is_no_model_is_a_usage_error(tmp_path, content):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="is not a safetensors file"):
        ModelFile.open(path)


def test_a_file_that_is_not_there_is_a_usage_error(tmp_path):
    for path in (tmp_path / "gone", tmp_path):
        with pytest.raises(UsageError, match="cannot read the model"):
            ModelFile.open(path)


@given(at=st.integers(min_value=0), bit=st.integers(0, 7), cut=st.integers(0, 40))
def test_a_garbled_file_is_a_usage_error_or_a_model_and_nothing_else(tmp_path_factory, at, bit, cut):
    path = tmp_path_factory.mktemp("garbled") / "m.safetensors"
    write(path, {"w": np.ones(3, np.float32), "n": np.array(1)})
    content = bytearray(path.read_bytes())
    content[at % len(content)] ^= 1 << bit
    path.write_bytes(content[: len(content) - cut])
    with contextlib.suppress(UsageError):
        read(path)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "empty"),
        (b"\x08\0\0", "cut short"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "Git LFS"),
        (b"\n<!DOCTYPE html>\n<html><title>404</title></html>", "web page"),
        (b"PK\x03\x04\x00\x00\x08\x08archive/data.pkl", "torch.save"),
        (b"\x80\x02}q\x00(X\x06\x00weight", "torch.save"),
        (b"GGUF\x03\x00\x00\x00\x01\x00", "GGUF"),
        (b"\xff" * 100, "header is too large"),
    ],
)
def test_a_file_given_in_place_of_a_model_is_called_what_it_is(tmp_path, content, why):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=why) as refused:
        ModelFile.open(path)
    assert str(path) in str(refused.value)


def test_a_header_whose_length_looks_like_another_format_is_read(tmp_path):
    """640 bytes of header begin as pickles of protocol 2 do."""
    text = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).ljust(640).encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", 640) + text + bytes(4))
    assert len(ModelFile.open(path).layout) == 1


TIED = (
    TensorSpec("head.weight", "float32", (2, 3), tied_names=("tok.weight",)),
    TensorSpec("mask", "float32", (4,), TensorRole.CONSTANT),
    TensorSpec("bn.running_var", "float32", (2,), TensorRole.STATISTIC),
)
TIED_VALUES = [
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.full(4, -np.inf, np.float32),
    np.ones(2, np.float32),
]


def test_roles_and_tied_names_are_in_the_file_and_each_tensor_counts_once(tmp_path):
    path = tmp_path / "m.safetensors"
    digest = write_model(path, TIED, TIED_VALUES)
    model = ModelFile.open(path)
    assert model.layout == TIED
    assert model.sha256() == digest
    assert model.as_written
    assert np.array_equal(model.tensor(1), TIED_VALUES[1])


def test_other_readers_find_a_tied_tensor_under_each_of_its_names(tmp_path):
    write_model(tmp_path / "m.safetensors", TIED, TIED_VALUES)
    found = load_file(tmp_path / "m.safetensors")
    assert found.keys() == {"head.weight", "mask", "bn.running_var", "tok.weight"}
    assert np.array_equal(found["tok.weight"], found["head.weight"])


def test_a_file_of_save_model_tells_the_names_that_it_leaves_out(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_model

    model = torch.nn.ModuleDict({"tok": torch.nn.Embedding(4, 2), "head": torch.nn.Linear(2, 4, bias=False)})
    model["head"].weight = model["tok"].weight
    save_model(model, str(tmp_path / "m.safetensors"))
    (spec,) = ModelFile.open(tmp_path / "m.safetensors").layout
    assert {spec.name, *spec.tied_names} == {"tok.weight", "head.weight"}


def test_a_file_without_roles_has_those_that_names_tell(tmp_path):
    save_file({"bn.running_var": np.ones(2, np.float32), "w": np.ones(2, np.float32)}, tmp_path / "m.safetensors")
    roles = {spec.name: spec.role for spec in ModelFile.open(tmp_path / "m.safetensors").layout}
    assert roles == {"bn.running_var": TensorRole.STATISTIC, "w": TensorRole.PARAMETER}


@pytest.mark.parametrize(
    "metadata",
    [
        {"roles": "[]"},
        {"roles": '{"w": "king"}'},
        {"roles": "{"},
        {"tied": '{"w": 3}'},
        {"tied": '{"w": [""]}'},
        {"tied": '{"w": ["v"]}'},
    ],
    ids=str,
)
def test_metadata_that_cannot_be_is_refused_in_one_line(tmp_path, metadata):
    tensors = {"v": np.zeros(3, np.float32), "w": np.zeros(2, np.float32)}
    save_file(tensors, tmp_path / "m.safetensors", metadata=metadata)
    with pytest.raises(UsageError, match=r"m\.safetensors"):
        ModelFile.open(tmp_path / "m.safetensors")
