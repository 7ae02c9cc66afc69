"""Updates of a simulation that stay in memory, and read as those in files do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedgrpc.codec.payload import tensors_of
from fedgrpc.errors import CorruptError
from fedgrpc.simulation.learning.uploads import MemoryJournal, UpdateInMemory, UploadInMemory
from fedgrpc.storage.update_file import StoredUpdate
from fedgrpc.storage.uploads import UploadJournal
from tests.support.stored_updates import accept, encoded, header_of

TENSORS = {"w": np.arange(100_000, dtype=np.float32), "n": np.array(3)}


def _accepted(journal: MemoryJournal, token: str, recipe: str = "raw") -> StoredUpdate:
    manifest, payload = encoded(TENSORS, recipe)
    upload = journal.begun(header_of(manifest, token), manifest)
    assert isinstance(upload, UploadInMemory)
    for at in range(0, len(payload), 4096):
        upload.append(payload[at : at + 4096])
    upload.finish()
    journal.remember(token, upload.seal())
    found = journal.load(token)
    assert found is not None
    return found


@pytest.mark.parametrize("recipe", ["raw", "raw+zstd", "int8", "entropy:c=3+zstd"])
def test_an_update_in_memory_reads_as_the_same_update_in_a_file(recipe: str, tmp_path: Path) -> None:
    held = _accepted(MemoryJournal(tmp_path / "memory"), "token", recipe)
    assert isinstance(held, UpdateInMemory)
    filed = accept(UploadJournal(tmp_path / "files"), "token", TENSORS, recipe)
    held.check()
    with held.open() as ours, filed.open() as theirs:
        found, wanted = tensors_of(ours), tensors_of(theirs)
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)
    ours, theirs = held.open(), filed.open()
    for (spec, piece), (other, same) in zip(ours.pieces(), theirs.pieces(), strict=True):
        assert spec == other
        np.testing.assert_array_equal(piece, same)


def test_an_update_that_does_not_fit_goes_to_a_file_until_others_are_discarded(tmp_path: Path) -> None:
    manifest, payload = encoded(TENSORS)
    journal = MemoryJournal(tmp_path, most_bytes=2 * len(payload))
    _accepted(journal, "a")
    _accepted(journal, "b")
    third = journal.begun(header_of(manifest, "c"), manifest)
    assert not isinstance(third, UploadInMemory)
    third.discard()
    journal.discard(["a"])
    assert journal.load("a") is None
    _accepted(journal, "c")
    assert journal.accepted() == {"b", "c"}


def test_an_update_that_a_later_round_counts_outlives_the_process(tmp_path: Path) -> None:
    journal = MemoryJournal(tmp_path)
    _accepted(journal, "a")
    _accepted(journal, "b")
    journal.write(["b", "elsewhere"])
    assert journal.accepted() == {"a", "b"}
    found = MemoryJournal(tmp_path).load("b")
    assert found is not None
    found.check()
    with found.open() as reader:
        np.testing.assert_array_equal(tensors_of(reader)["w"], TENSORS["w"])
    assert MemoryJournal(tmp_path).accepted() == {"b"}


def test_fewer_bytes_than_were_declared_are_no_update(tmp_path: Path) -> None:
    manifest, payload = encoded(TENSORS)
    upload = MemoryJournal(tmp_path).begun(header_of(manifest), manifest)
    assert isinstance(upload, UploadInMemory)
    upload.append(payload[:-1])
    with pytest.raises(CorruptError):
        upload.finish()
