"""Tests of the example plugins by themselves: no aggregator, no files but the tracker's."""

import numpy as np
import pytest
from fedgrpc_example.aggregation import Midrange, SignSgd
from fedgrpc_example.encoding import Fixed16
from fedgrpc_example.partition import Stripes
from fedgrpc_example.selection import RoundRobin
from fedgrpc_example.tracker import Csv

from fedgrpc.codec.layout import TensorSpec
from fedgrpc.errors import EncodeError
from fedgrpc.rounds.history import WorkerHistory


def test_the_midrange_leaves_out_who_does_not_cover_a_coordinate():
    updates = np.array([[0.0, 1.0, np.nan], [4.0, np.nan, np.nan], [1.0, 3.0, np.nan]])
    assert Midrange().combine(updates)[:2].tolist() == [2.0, 2.0]
    assert np.isnan(Midrange().combine(updates)[2])
    assert Midrange(trim=1).combine(updates)[0] == 1.0


def test_signsgd_steps_by_the_sign_alone():
    weights, state = SignSgd(learning_rate=0.5).step(np.zeros(3), np.array([-7.0, 0.0, 0.1]), ())
    assert weights.tolist() == [-0.5, 0.0, 0.5]
    assert state == ()


def test_workers_are_selected_in_turn():
    histories = {"a": WorkerHistory(selected_in=5), "b": WorkerHistory(selected_in=2)}
    chosen = RoundRobin().choose(["a", "b", "c"], 2, histories, 6, np.random.default_rng(0))
    assert chosen == ["c", "b"]


def test_the_encoding_keeps_its_error_bound():
    values = np.random.default_rng(0).uniform(-4, 4, 1000).astype(np.float32)
    encoding = Fixed16()
    data = encoding.encode(values, np.random.default_rng(0))
    decoded = encoding.decode(memoryview(data), TensorSpec("w", "float32", (1000,)))
    assert np.abs(decoded - values).max() <= 4 / 65534 + 1e-6
    with pytest.raises(EncodeError):
        encoding.encode(np.array([5.0]), np.random.default_rng(0))


def test_stripes_are_disjoint_and_together_all():
    parts = Stripes(per_part=2).split(np.zeros(11), 3, seed=0)
    assert sorted(np.concatenate(parts).tolist()) == list(range(11))


def test_the_tracker_writes_a_line_for_each_figure(tmp_path):
    tracker = Csv(str(tmp_path / "figures.csv"))
    tracker.begin("night", {})
    tracker.log(3, {"loss": 0.5}, 0.0)
    tracker.end()
    assert (tmp_path / "figures.csv").read_text() == "night,3,loss,0.5\n"
