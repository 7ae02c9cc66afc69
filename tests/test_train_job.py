"""The batches of a job: complete epochs, seeded order, and everything a federation asks between two of them."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgrpc.errors import UsageError
from fedgrpc.trainer import Cancelled, Epoch, LocalExamples, TaskSetup, TrainJob


@given(st.integers(1, 200), st.integers(1, 50), st.integers(1, 4))
def test_every_epoch_visits_every_example_once(examples: int, batch_size: int, epochs: int) -> None:
    batches = list(TrainJob(epochs=epochs, batch_size=batch_size).batches(examples))
    per_epoch = len(batches) // epochs
    for epoch in range(epochs):
        visited = np.concatenate(batches[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert sorted(visited.tolist()) == list(range(examples))


@given(st.floats(0.01, 5), st.integers(1, 500), st.integers(1, 64), st.one_of(st.none(), st.integers(1, 20)))
def test_as_many_batches_come_as_were_announced(
    epochs: float, examples: int, batch_size: int, cap: int | None
) -> None:
    job = TrainJob(epochs=epochs, batch_size=batch_size, max_steps=cap)
    assert len(list(job.batches(examples))) == job.total_steps(examples)


def test_half_an_epoch_is_half_the_steps() -> None:
    assert TrainJob(epochs=0.5, batch_size=10).total_steps(100) == 5
    assert TrainJob(epochs=0.1 * 3, batch_size=10).total_steps(100) == 3  # 0.30000000000000004 is no fourth step


def test_a_job_without_batch_size_takes_the_tasks() -> None:
    assert len(next(TrainJob().batches(100, 25))) == 25
    assert len(next(TrainJob(batch_size=10).batches(100, 25))) == 10


def test_order_follows_from_seed_and_round_alone() -> None:
    def order(seed: int, round: int) -> list[int]:
        return np.concatenate(list(TrainJob(seed=seed, round=round).batches(100))).tolist()  # type: ignore[no-any-return]

    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(seed, round)) for seed in (1, 2) for round in (1, 2)}) == 4


@pytest.mark.parametrize("seed", [-1, 1 << 32])
def test_a_seed_that_the_generators_of_numpy_and_scikit_learn_refuse_is_refused(seed: int) -> None:
    np.random.RandomState((1 << 32) - 1)
    for make in (TrainJob, TaskSetup):
        assert make(seed=(1 << 32) - 1).seed
        with pytest.raises(UsageError, match="seed must be from 0 to 4294967295"):
            make(seed=seed)


def test_stop_cancels_between_two_batches() -> None:
    stops = iter([False, False, False, True])
    batches = TrainJob(epochs=9, stop=lambda: next(stops)).batches(1000)
    assert len([next(batches) for _ in range(3)]) == 3
    with pytest.raises(Cancelled):
        next(batches)


def test_a_job_out_of_time_ends_with_what_it_has_and_trains_one_batch_at_least() -> None:
    left = iter([2.0, 1.0, 0.0])
    assert len(list(TrainJob(time_left_s=lambda: next(left)).batches(1000))) == 3
    assert len(list(TrainJob(time_left_s=lambda: -1.0).batches(1000))) == 1


def test_progress_is_reported_after_every_batch() -> None:
    reports: list[tuple[int, int]] = []
    list(TrainJob(batch_size=50, report=lambda done, total: reports.append((done, total))).batches(120))
    assert reports == [(1, 3), (2, 3), (3, 3)]


def test_pause_is_told_how_long_each_batch_took() -> None:
    pauses: list[float] = []
    for _ in TrainJob(batch_size=50, pause=pauses.append).batches(100):
        time.sleep(0.01)
    assert len(pauses) == 2
    assert min(pauses) >= 0.01


def test_each_epoch_is_reported_with_its_batches() -> None:
    reported: list[Epoch] = []
    list(TrainJob(epochs=2.5, batch_size=50, report_epoch=reported.append).batches(200))
    assert [(epoch.number, epoch.of, epoch.batches) for epoch in reported] == [(1, 3, 4), (2, 3, 4), (3, 3, 2)]
    assert all(epoch.seconds > 0 for epoch in reported)


def test_an_epoch_that_runs_out_of_time_is_reported_with_the_batches_that_it_had() -> None:
    left = iter([1.0, 1.0, 1.0, 1.0, 0.0])
    reported: list[Epoch] = []
    job = TrainJob(epochs=3, batch_size=50, time_left_s=lambda: next(left), report_epoch=reported.append)
    assert len(list(job.batches(200))) == 5
    assert [(epoch.number, epoch.of, epoch.batches) for epoch in reported] == [(1, 3, 4), (2, 3, 1)]


def test_examples_are_new_as_far_as_they_are_more_and_all_of_other_data_that_is_no_more() -> None:
    trained = LocalExamples(100, "monday")
    assert LocalExamples(100, "monday").new_since(None) == 100
    assert LocalExamples(100, "monday").new_since(trained) == 0
    assert LocalExamples(130, "tuesday").new_since(trained) == 30
    assert LocalExamples(100, "tuesday").new_since(trained) == 100
    assert LocalExamples(20, "tuesday").new_since(trained) == 20
