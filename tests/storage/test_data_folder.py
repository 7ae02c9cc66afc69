"""The data folder fails and mends: said once each time, whoever tries meanwhile."""

import structlog
from structlog.testing import capture_logs

from fedgrpc.errors import StorageError
from fedgrpc.storage.data_folder import DataFolder, Use


def test_a_failure_is_in_the_log_once_and_again_when_it_mends():
    changes = []
    with capture_logs() as lines:
        folder = DataFolder(structlog.get_logger(), lambda: changes.append(folder.healthy))
        for _ in range(3):
            folder.failed(Use.UPDATES, StorageError("No space left on device"))
        folder.failed(Use.UPDATES, StorageError("Input/output error"))
        for _ in range(2):
            folder.works(Use.UPDATES)
    assert changes == [False, False, True]
    errors = [line["error"] for line in lines if line["log_level"] == "error"]
    assert errors == ["No space left on device", "Input/output error"]


def test_one_use_that_works_does_not_hide_that_another_fails():
    folder = DataFolder(structlog.get_logger(), lambda: None)
    folder.failed(Use.ROUNDS, StorageError("full"))
    folder.works(Use.UPDATES)
    assert not folder.healthy
    folder.works(Use.ROUNDS)
    assert folder.healthy


def test_old_files_that_cannot_be_removed_do_not_make_it_unhealthy():
    folder = DataFolder(structlog.get_logger(), lambda: None)
    folder.failed(Use.OLD_FILES, StorageError("Input/output error"))
    assert folder.healthy
