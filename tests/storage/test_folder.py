"""One folder of one process: its lock."""

import shutil

import pytest

from fedgrpc.errors import UsageError
from fedgrpc.storage.folder import hold_folder

USED = "is used by another"


def test_a_folder_is_held_by_one_process(tmp_path):
    with hold_folder(tmp_path / "a", USED):
        second = hold_folder(tmp_path / "a", USED)
        with pytest.raises(UsageError, match=USED):
            second.__enter__()
    with hold_folder(tmp_path / "a", USED):
        pass


def test_no_file_that_could_be_deleted_holds_the_folder(tmp_path):
    with hold_folder(tmp_path / "a", USED):
        assert not list((tmp_path / "a").iterdir())


def test_a_removed_or_replaced_folder_is_noticed(tmp_path):
    with hold_folder(tmp_path / "a", USED) as folder:
        folder.check()
        shutil.rmtree(tmp_path / "a")
        with pytest.raises(UsageError, match="removed"):
            folder.check()
        (tmp_path / "a").mkdir()
        with pytest.raises(UsageError, match="removed"):
            folder.check()


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(UsageError, match="cannot use the folder"), hold_folder(tmp_path / "a", USED):
        pass
