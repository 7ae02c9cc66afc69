"""Simulated fleets: where there is a closed form, the simulation gives it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedgrpc.errors import UsageError
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.simulation.devices import Devices
from fedgrpc.simulation.fleet import DescribedFleet, DeviceKind, FleetVariant, Payload
from fedgrpc.simulation.fleet_result import FleetResult
from fedgrpc.simulation.fleet_run import FleetRun

# 1 MB both ways: 2 s down, 8 s up; 2 x 0.05 s of latency and 60 s of training.
EXACT = DeviceKind("exact", 20, train_s=60.0, up_mbit=1.0, down_mbit=4.0, spread=0.0, jitter=0.0)
PAYLOAD = Payload(parameters=1_000_000, download_bits=8.0, upload_bits=8.0)
TASK_S = 0.1 + 2.0 + 60.0 + 8.0
POLICY = RoundPolicy(min_workers=10, max_participants=10, deadline_s=300.0, selection_window_s=0.0)


def _play(
    classes: tuple[DeviceKind, ...] = (EXACT,), hours: float = 2.0, seed: int = 0, **rules: Any
) -> FleetResult:
    policy = replace(POLICY, **rules.pop("policy", {}))
    variant = FleetVariant(policy=policy, model=PAYLOAD, commit_s=1.0, **rules)
    return FleetRun(DescribedFleet(classes, (variant,)), variant, seed).run(hours * 3600)


def test_a_round_of_exact_devices_takes_exactly_one_task_and_a_commit() -> None:
    result = _play()
    assert result.round_s_median == pytest.approx(TASK_S + 1.0)
    assert result.round_s_p95 == pytest.approx(TASK_S + 1.0)
    assert result.rounds == int(2 * 3600 / (TASK_S + 1.0))
    assert result.abandoned == 0
    assert result.updates == 10 * result.rounds


def test_bytes_and_work_are_those_of_the_tasks_and_nothing_is_wasted() -> None:
    result = _play(hours=10 * (TASK_S + 1.0) / 3600 + 1e-6)
    assert result.rounds == 10
    assert result.wasted_training_share == result.wasted_bytes_share == 0.0
    assert result.trained_hours == pytest.approx(100 * 60.0 / 3600)
    assert result.up_bytes == 100 * 1_000_000
    assert result.down_bytes == 100 * 1_000_000


def test_an_encoding_of_fewer_bits_saves_its_share_of_the_transfer() -> None:
    few = FleetVariant(policy=POLICY, model=replace(PAYLOAD, upload_bits=1.0), commit_s=1.0)
    result = FleetRun(DescribedFleet((EXACT,), (few,)), few, 0).run(7200)
    assert result.round_s_median == pytest.approx(0.1 + 2.0 + 60.0 + 1.0 + 1.0)


@pytest.mark.faults
def test_over_selection_saves_waiting_for_the_slow_and_wastes_their_work() -> None:
    slow = replace(EXACT, name="slow", count=5, train_s=250.0)
    classes = (replace(EXACT, count=15), slow)
    patient = _play(classes, hours=6.0)
    eager = _play(classes, hours=6.0, policy={"over_selection": 1.5})
    assert patient.wasted_training_share == 0.0
    assert eager.wasted_training_share > 0.2
    assert eager.rounds_per_hour > 1.5 * patient.rounds_per_hour
    assert eager.classes[1].merged_share < 0.1 < patient.classes[1].merged_share


@pytest.mark.faults
def test_carrying_late_updates_saves_that_work() -> None:
    classes = (replace(EXACT, count=15), replace(EXACT, name="slow", count=5, train_s=150.0))
    rules = {"over_selection": 1.5, "lease_s": 30.0}
    discarded = _play(classes, hours=6.0, policy=rules)
    carried = _play(classes, hours=6.0, policy={**rules, "late": "carry"})
    assert discarded.stale_share == 0.0 < carried.stale_share
    assert carried.wasted_training_share < 0.1 * discarded.wasted_training_share
    assert carried.classes[1].took_part_share == 1.0


def test_a_buffer_commits_without_waiting_for_anybody() -> None:
    classes = (replace(EXACT, count=10), replace(EXACT, name="slow", count=10, train_s=600.0))
    rounds = _play(classes, hours=6.0, policy={"deadline_s": 900.0})
    buffered = _play(classes, hours=6.0, policy={"deadline_s": 900.0, "late": "carry", "buffer_size": 5})
    assert buffered.updates > 2 * rounds.updates
    assert buffered.stale_share > 0.1


def test_a_deadline_that_nobody_can_meet_abandons_every_round() -> None:
    result = _play(policy={"deadline_s": 30.0})
    assert result.rounds == result.updates == 0
    assert result.abandoned > 10
    assert result.wasted_training_share == 1.0


@pytest.mark.faults
def test_a_learned_deadline_cuts_off_the_few_that_are_far_slower() -> None:
    classes = (replace(EXACT, count=95), replace(EXACT, name="slow", count=5, train_s=2000.0))
    rules: dict[str, Any] = {"max_participants": 40, "min_workers": 40, "quorum": 20, "deadline_s": 3000.0}
    rules |= {"over_selection": 1.2}
    result = _play(classes, hours=5.0, deadline="learned", policy=rules)
    deadlines = [line.deadline_s for line in result.lines]
    assert deadlines[0] == 3000.0
    assert np.median(deadlines[1:]) == pytest.approx(1.2 * (TASK_S - 0.1), rel=0.1)


def test_failed_tasks_are_replaced_within_the_round() -> None:
    result = _play((replace(EXACT, count=40, failure=0.2),), hours=6.0)
    assert result.abandoned == 0
    assert result.updates == 10 * result.rounds
    (line,) = result.classes
    assert line.merged_share == pytest.approx(0.8, abs=0.05)


def test_devices_that_come_and_go_are_reachable_for_their_share_of_the_time() -> None:
    devices = Devices((replace(EXACT, count=4000, available=0.3, session_s=600.0),), 1)
    shares = []
    for hour in range(1, 11):
        devices.advance(3600.0 * hour)
        shares.append(devices.reachable.mean())
    assert np.mean(shares) == pytest.approx(0.3, abs=0.02)
    assert (devices.changes_at > 36_000.0).all()


@pytest.mark.faults
def test_transfers_wait_while_a_device_is_out_of_reach() -> None:
    steady = _play((replace(EXACT, count=200),), hours=6.0, policy={"quorum": 1})
    flighty = replace(EXACT, count=200, available=0.7, session_s=120.0)
    result = _play((flighty,), hours=6.0, policy={"quorum": 1})
    assert result.rounds > 0
    assert result.round_s_median > 1.2 * steady.round_s_median


def test_every_device_takes_part_in_time() -> None:
    assert _play(hours=4.0).took_part_share == 1.0


def test_the_same_seed_gives_the_same_result_and_another_seed_another() -> None:
    classes = (replace(EXACT, count=50, spread=0.3, jitter=0.2, available=0.8, session_s=600.0),)
    assert _play(classes, seed=3) == _play(classes, seed=3)
    assert _play(classes, seed=3).to_json() != _play(classes, seed=4).to_json()


@pytest.mark.faults
def test_oort_prefers_the_fast_and_leaves_nobody_out() -> None:
    classes = (replace(EXACT, count=50), replace(EXACT, name="slow", count=50, train_s=240.0))
    uniform = _play(classes, hours=8.0, policy={"over_selection": 1.5})
    oort = _play(classes, hours=8.0, policy={"over_selection": 1.5}, selection="oort")
    assert oort.rounds_per_hour > 1.1 * uniform.rounds_per_hour
    assert min(line.tasks for line in oort.classes) > 50
    assert oort.classes[0].tasks > 1.2 * oort.classes[1].tasks


DOCUMENT: dict[str, Any] = {
    "model": {"parameters": 1000, "upload_bits": 8},
    "rules": {"selection": "oort", "policy": {"quorum": 3}},
    "devices": [{"name": "pi", "count": 5, "train_s": 60, "up_mbit": 1, "down_mbit": 4}],
}


def test_a_variant_changes_what_it_names_and_keeps_the_rest() -> None:
    variants = [{"name": "a"}, {"name": "b", "policy": {"deadline_s": 60}, "model": {"upload_bits": 1}}]
    fleet = DescribedFleet.parse({**DOCUMENT, "variants": variants})
    first, second = fleet.variants
    assert (first.name, first.selection, first.policy.quorum, first.model.upload_bytes) == ("a", "oort", 3, 1000)
    assert (second.selection, second.policy.quorum, second.policy.deadline_s) == ("oort", 3, 60)
    assert second.model.upload_bytes == 125
    assert second.model.download_bytes == 4000


def test_a_fleet_without_variants_is_played_as_given() -> None:
    (variant,) = DescribedFleet.parse(DOCUMENT).variants
    assert variant.name == "as given"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"devices": []}, r"no \[\[devices\]\]"),
        ({"devices": {}}, "devices.* tables in double brackets"),
        ({"devices": [{"name": "pi"}]}, "has no 'count'"),
        ({"devices": [{**DOCUMENT["devices"][0], "colour": "red"}]}, "number 1 of .*devices.* has no 'colour'"),
        ({"devices": [{**DOCUMENT["devices"][0], "count": 0}]}, "count of devices 'pi' must be positive"),
        ({"devices": [{**DOCUMENT["devices"][0], "count": "many"}]}, "count of number 1 of .* a whole number"),
        ({"devices": [{**DOCUMENT["devices"][0], "available": 0}]}, "available of devices 'pi'"),
        ({"devices": [{**DOCUMENT["devices"][0], "failure": 1.0}]}, "failure of devices 'pi'"),
        ({"devices": [{**DOCUMENT["devices"][0], "jitter": -1}]}, "jitter of devices 'pi'"),
        ({"devices": [{**DOCUMENT["devices"][0], "name": "/tmp/x"}]}, "without '/'"),
        ({"devices": [{**DOCUMENT["devices"][0], "name": "x\n"}]}, "printable"),
        ({"devices": [{**DOCUMENT["devices"][0], "count": 2_000_000}]}, "more than 1000000"),
        ({"model": {"parameters": 0}}, "parameters of the model must be positive"),
        ({"model": 3}, r"\[model\] is a table"),
        ({"rules": {"selection": "best"}}, "selection of .*rules.* is 'uniform' or 'oort'"),
        ({"rules": {"deadline": "soon"}}, "deadline of .*rules.* is 'fixed' or 'learned'"),
        ({"rules": {"policy": {"quorum": 0}}}, "quorum must be"),
        ({"rules": {"policy": {"speed": 1}}}, "policy of .*rules.* has no 'speed'"),
        ({"variants": [{"nam": "a"}]}, "number 1 of .*variants.* has no 'nam'"),
        ({"fleet": {}}, "no 'fleet' in a fleet file"),
    ],
    ids=str,
)
def test_a_fleet_file_that_makes_no_sense_is_refused_with_what_is_wrong(
    change: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(UsageError, match=complaint):
        DescribedFleet.parse({**DOCUMENT, **change})
