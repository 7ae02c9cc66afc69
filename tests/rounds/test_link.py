"""How fast a link is, by what went through it."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from fedgrpc.rounds.events import TaskPhase
from fedgrpc.rounds.history import NO_RATES, cut_download, cut_upload
from fedgrpc.rounds.task import Task, UploadPace

KB = 1000


def test_the_median_of_the_last_transfers_counts() -> None:
    rates = NO_RATES
    for kilobytes in (100, 900, 110, 120, 90):
        rates = rates.after(kilobytes * KB, 1.0)
    assert rates.bytes_per_second == 110 * KB
    for _ in range(3):
        rates = rates.after(2_000 * KB, 1.0)
    assert rates.bytes_per_second == 2_000 * KB
    assert len(rates.samples) == 5


def test_nothing_is_told_by_what_is_over_at_once_or_never_was() -> None:
    assert NO_RATES.after(18 * KB, 0.03) == NO_RATES
    # On a busy machine two kilobytes may take a second.
    assert NO_RATES.after(2 * KB, 1.0) == NO_RATES
    assert NO_RATES.after(2 * KB, 20.0).bytes_per_second == 100
    assert NO_RATES.after(0, 1.0) == NO_RATES
    assert NO_RATES.after(18 * KB, 0.0) == NO_RATES
    assert NO_RATES.bytes_per_second is None
    # Large enough not to be the round trip alone.
    assert NO_RATES.after(2_000 * KB, 0.02).bytes_per_second == 100_000 * KB


def test_a_slow_link_stays_slow_though_its_updates_have_become_small_until_one_is_faster() -> None:
    slow = NO_RATES.after(400 * KB, 4.0)
    assert slow.after(10 * KB, 0.1) == slow
    assert slow.after(5 * KB, 0.001) == slow
    quick = slow.after(20 * KB, 0.01).after(20 * KB, 0.01)
    assert quick.bytes_per_second == 2_000 * KB


def late(**changes: object) -> Task:
    entered = {TaskPhase.DOWNLOADING: 10.0, TaskPhase.LATE: 30.0}
    task = Task("pi", 0, 0.0, TaskPhase.LATE, entered=MappingProxyType(entered))
    return replace(task, **changes)  # type: ignore[arg-type]


def test_an_upload_that_was_too_slow_tells_how_slow() -> None:
    entered = MappingProxyType({TaskPhase.UPLOADING: 20.0, TaskPhase.LATE: 30.0})
    # The last byte came at 25; after that the link was silent, which is not what it is like.
    pace = UploadPace.begun(0, 900 * KB, 20.0).moved(300 * KB, 25.0, 1.0)
    assert cut_upload(late(entered=entered, pace=pace)) == (300 * KB, 5.0)
    assert cut_upload(late(entered=entered)) == (0.0, 0.0)
    assert cut_upload(late(pace=pace)) == (0.0, 0.0)
    accepted = MappingProxyType({TaskPhase.UPLOADING: 20.0, TaskPhase.ACCEPTED: 30.0})
    assert cut_upload(late(entered=accepted, pace=pace)) == (0.0, 0.0)


def test_a_download_that_was_too_slow_tells_how_slow() -> None:
    assert cut_download(late(fraction=0.25), 400 * KB) == (100 * KB, 20.0)
    training = MappingProxyType({TaskPhase.DOWNLOADING: 10.0, TaskPhase.TRAINING: 12.0, TaskPhase.LATE: 30.0})
    assert cut_download(late(fraction=0.25, entered=training), 400 * KB) == (0.0, 0.0)
    assert cut_download(late(fraction=0.25, entered=MappingProxyType({})), 400 * KB) == (0.0, 0.0)
