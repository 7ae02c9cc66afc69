"""Residuals on disk: what an update left behind comes back bit for bit, or not at all."""

import numpy as np

from fedgrpc.codec.feedback import Residual
from fedgrpc.codec.layout import layout_of
from fedgrpc.codec.values import part_of
from fedgrpc.storage.residual_file import ResidualWriter, read_residual, write_residual
from tests.support.residuals import equal, residual_of, tensors


def test_a_residual_comes_back_bit_for_bit_in_every_dtype(tmp_path):
    path = tmp_path / "residual"
    write_residual(path, residual_of(tensors()), "run")
    back = read_residual(path, "run")
    assert equal(back, residual_of(tensors()))
    assert all(array.flags.writeable for array in back.tensors.values())


def test_a_damaged_residual_is_dropped_not_applied(tmp_path):
    path = tmp_path / "residual"
    write_residual(path, residual_of(tensors()), "run")
    content = bytearray(path.read_bytes())
    last, first = content[:-1] + bytes([content[-1] ^ 1]), bytes([content[0] ^ 1]) + content[1:]
    text = b'{"run": "run"}'
    for damaged in (
        content[:-1],
        last,
        first,
        content[1:],
        b"",
        b"\xff" * 8,
        text + bytes([len(text)]) + bytes(7),
    ):
        path.write_bytes(bytes(damaged))
        assert read_residual(path, "run") == Residual()


def test_a_residual_may_be_written_and_read_in_parts(tmp_path):
    array = np.random.default_rng(0).normal(size=(50, 2000)).astype(np.float32)
    writer = ResidualWriter(tmp_path / "residual", "run")
    for start in range(0, array.size, 32768):
        writer.add("w", array.reshape(-1)[start : start + 32768])
    writer.add("after", np.ones(3, np.float32))
    layout = (*layout_of({"w": array}), *layout_of({"after": np.ones(3, np.float32)}))
    writer.finish(layout)
    stored = read_residual(tmp_path / "residual", "run").tensors
    np.testing.assert_array_equal(stored["w"], array)
    np.testing.assert_array_equal(stored["after"], np.ones(3))
    part = part_of(stored, "w")
    for start, stop in ((0, 10), (99_990, 100_000), (32768, 65536)):
        np.testing.assert_array_equal(part(start, stop), array.reshape(-1)[start:stop])


def test_the_residual_file_is_the_arrays_and_little_more(tmp_path):
    path = tmp_path / "residual"
    write_residual(path, residual_of(tensors()), "run")
    content = path.read_bytes()
    arrays = b"".join(array.tobytes() for array in tensors().values())
    assert content.startswith(arrays)
    assert len(content) < len(arrays) + 400


def test_a_residual_file_that_tells_of_its_arrays_in_deep_nests_is_dropped(tmp_path):
    path = tmp_path / "residual"
    about = b"[" * 100_000
    path.write_bytes(about + len(about).to_bytes(8, "little"))
    assert not read_residual(path, "run").tensors
