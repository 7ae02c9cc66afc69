"""Syncs that share: each who returns is covered by one that began after it asked, and few are made for many."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fedgrpc.storage.grouped_syncs import GroupedSyncs


class Disk:
    """What has been renamed, and what of it a power cut would leave; one sync at a time, and slow."""

    def __init__(self, fails=()):
        self.renamed, self.durable = set(), set()
        self.syncs = 0
        self._fails = fails
        self._one_at_a_time = threading.Lock()

    def sync(self, folder):
        assert self._one_at_a_time.acquire(blocking=False)
        try:
            self.syncs += 1
            there = set(self.renamed)
            time.sleep(0.01)
            if self.syncs in self._fails:
                raise OSError(5, "Input/output error")
            self.durable |= there
        finally:
            self._one_at_a_time.release()


def sealed(disk, syncs, number):
    disk.renamed.add(number)
    try:
        syncs.sync()
    except OSError:
        return False
    assert number in disk.durable
    return True


def test_many_that_end_together_share_syncs_and_none_returns_before_its_name_is_durable():
    disk = Disk()
    syncs = GroupedSyncs(Path("updates"), disk.sync)
    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(lambda number: sealed(disk, syncs, number), range(160)))
    assert disk.durable == set(range(160))
    assert disk.syncs <= 80


def test_one_alone_has_a_sync_of_its_own():
    disk = Disk()
    syncs = GroupedSyncs(Path("updates"), disk.sync)
    for number in range(3):
        assert sealed(disk, syncs, number)
        assert disk.syncs == number + 1


@pytest.mark.parametrize("fails", [{1}, {2, 3}, set(range(1, 200, 2))])
def test_whoever_a_failed_sync_was_to_cover_learns_of_it(fails):
    disk = Disk(fails)
    syncs = GroupedSyncs(Path("updates"), disk.sync)
    with ThreadPoolExecutor(8) as pool:
        told = list(pool.map(lambda number: sealed(disk, syncs, number), range(60)))
    # `sealed` has checked those that were told that all is well.
    assert not all(told)
    assert sealed(disk, syncs, 60) or sealed(disk, syncs, 61)
    assert not syncs._failures
