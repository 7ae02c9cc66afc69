"""Sharing a fleet between runs: who gets which idle worker, and that nobody waits for ever."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgrpc.errors import UsageError
from fedgrpc.runs.scheduler import Demand, Order, Share, ordered, share_out

PATIENCE_S = 60.0


def of(run: str, wanted: int = 1, needed: int = 1, supply: int = 10, **more) -> Demand:
    return Demand(run, wanted, needed, supply, **more)


def test_a_run_that_few_workers_can_serve_gets_those_first():
    scarce, common = of("scarce", supply=2), of("common", supply=10)
    assert share_out([common, scarce], {"cuda-1": {"scarce", "common"}}) == {"cuda-1": "scarce"}


def test_a_run_is_given_workers_that_others_cannot_use():
    idle = {"cuda-1": {"common", "scarce"}, "pi-1": {"common"}}
    demands = [of("common", supply=3), of("scarce", wanted=1, supply=10)]
    assert share_out(demands, idle) == {"pi-1": "common", "cuda-1": "scarce"}


def test_of_runs_with_the_same_workers_the_shortest_is_first():
    demands = [of("long", tasks_left=900), of("short", tasks_left=10), of("endless")]
    assert [demand.run for demand in ordered(demands)] == ["short", "long", "endless"]


def test_fifo_goes_by_the_start_of_runs():
    demands = [of("second", supply=1, began_at=2.0), of("first", supply=50, began_at=1.0)]
    assert ordered(demands, order=Order.FIFO)[0].run == "first"


def test_a_higher_priority_comes_before_scarcity():
    demands = [of("scarce", supply=1), of("urgent", supply=50, share=Share(priority=1))]
    assert share_out(demands, {"pi": {"scarce", "urgent"}}) == {"pi": "urgent"}


def test_a_quota_bounds_the_workers_of_a_run_with_those_at_work():
    demand = of("run", wanted=9, busy=2, share=Share(quota=3))
    assert share_out([demand], {name: {"run"} for name in "abc"}) == {"a": "run"}


def test_too_few_workers_for_a_round_go_to_another_run():
    idle = {name: {"large", "small"} for name in "ab"}
    demands = [of("large", wanted=4, needed=4, supply=5), of("small", wanted=2, supply=10)]
    assert set(share_out(demands, idle).values()) == {"small"}


def test_a_run_that_has_waited_too_long_collects_workers_until_its_round_can_open():
    idle = {name: {"large", "small"} for name in "ab"}
    waiting = of("large", wanted=4, needed=4, supply=5, waited_s=PATIENCE_S + 1)
    assert set(share_out([waiting, of("small", supply=1)], idle, PATIENCE_S).values()) == {"large"}


def test_a_run_for_which_too_few_workers_are_alive_collects_none():
    hopeless = of("large", wanted=4, needed=4, supply=3, waited_s=PATIENCE_S + 1)
    assert share_out([hopeless, of("small", supply=9)], {"a": {"large", "small"}}) == {"a": "small"}


@pytest.mark.parametrize("wrong", [{"priority": 1001}, {"quota": 0}])
def test_a_share_is_checked(wrong):
    with pytest.raises(UsageError):
        Share(**wrong)


RUNS = ("a", "b", "c", "d")
demands_ = st.lists(
    st.builds(
        Demand,
        run=st.sampled_from(RUNS),
        wanted=st.integers(0, 6),
        needed=st.integers(1, 4),
        supply=st.integers(1, 20),
        busy=st.integers(0, 6),
        tasks_left=st.integers(1, 99).map(float),
        waited_s=st.sampled_from([0.0, 30.0, 100.0, 1000.0]),
        share=st.builds(Share, st.integers(-2, 2), st.none() | st.integers(1, 6)),
    ),
    max_size=4,
    unique_by=lambda demand: demand.run,
)
idle_ = st.dictionaries(st.sampled_from([f"pi-{n}" for n in range(12)]), st.sets(st.sampled_from(RUNS)))


@given(demands_, idle_)
def test_nobody_gets_a_worker_that_may_not_serve_it_or_more_than_it_wants(demands, idle):
    given_ = share_out(demands, idle, PATIENCE_S)
    by_run = {demand.run: demand for demand in demands}
    for worker, run in given_.items():
        assert run in idle[worker]
    for run in set(given_.values()):
        assert 0 < list(given_.values()).count(run) <= by_run[run].room


@given(demands_, idle_)
def test_no_worker_is_left_idle_that_some_round_could_open_with(demands, idle):
    given_ = share_out(demands, idle, PATIENCE_S)
    for demand in demands:
        has = list(given_.values()).count(demand.run)
        free = [worker for worker in idle if worker not in given_ and demand.run in idle[worker]]
        assert has >= demand.room or has + len(free) < demand.needed or not free


@given(st.integers(1, 6), st.integers(1, 6))
def test_every_run_is_served_in_the_end(runs, workers):
    """One worker at a time comes free, and each run wants one for ever: no run waits longer than the patience
    and as many rounds as there are runs.
    """
    names = [f"run-{number}" for number in range(runs)]
    waited = dict.fromkeys(names, 0.0)
    for _ in range(100):
        demands = [
            of(name, supply=1 + index, share=Share(priority=index), waited_s=waited[name])
            for index, name in enumerate(names)
        ]
        served = set(share_out(demands, {"pi": set(names)}, PATIENCE_S).values())
        waited = {name: 0.0 if name in served else waited[name] + 10.0 for name in names}
        assert max(waited.values()) <= PATIENCE_S + 10.0 * (runs + 1)
