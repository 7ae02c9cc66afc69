"""A device's memory of secure sums: whatever it is asked, and whenever it restarts, it says one thing."""

import os
import time
from dataclasses import replace

import pytest

from fedgrpc.errors import UpdateRefused
from fedgrpc.privacy.one_time_keys import Secrets
from fedgrpc.privacy.secure_sum import Circle
from fedgrpc.worker.secure_memory import SecureMemory
from tests.support.sealed_shares import sealed_to

OTHERS = {name: Secrets(bytes([number]) * 32) for number, name in enumerate("bcd", start=1)}
EVERYBODY = frozenset("abcd")


def circle(session=b"session", threshold=2, names="bcd"):
    keys = {name: OTHERS[name].public for name in names}
    return Circle(session, "a", keys, {name: place for place, name in enumerate("abcd", start=1)}, threshold)


def restarted(tmp_path):
    """The memory as the next process finds it."""
    return SecureMemory(tmp_path / "secure")


def masked(tmp_path, sha256=b"1" * 32):
    """The memory of a device that has sent its update."""
    memory = restarted(tmp_path)
    keys = memory.public_keys()
    task = memory.begin("t", circle(), keys)
    task = memory.fix("t", task.with_roster(EVERYBODY, sealed_to(circle(), keys, OTHERS)))
    return memory.fix("t", task.with_masked(sha256))


def test_keys_stay_the_same_until_a_sum_takes_them_and_are_never_used_twice(tmp_path):
    keys = restarted(tmp_path).public_keys()
    assert restarted(tmp_path).public_keys() == keys
    shares = restarted(tmp_path).begin("t", circle(), keys).sealed_shares()
    # The same task again, as after a lost answer: the same bytes.
    assert restarted(tmp_path).begin("t", circle(), keys).sealed_shares() == shares
    assert restarted(tmp_path).public_keys() != keys
    with pytest.raises(UpdateRefused, match="used or never had"):
        restarted(tmp_path).begin("another", circle(b"another"), keys)


def test_a_task_keeps_its_circle_over_restarts(tmp_path):
    memory = restarted(tmp_path)
    keys = memory.public_keys()
    memory.begin("t", circle(), keys)
    for other in (circle(b"other"), circle(threshold=3), circle(names="bc")):
        with pytest.raises(UpdateRefused, match="circle"):
            restarted(tmp_path).begin("t", other, keys)


def test_the_owner_s_present_demands_hold_for_a_sum_that_a_former_process_began(tmp_path):
    memory = restarted(tmp_path)
    keys = memory.public_keys()
    memory.begin("t", circle(), keys)
    task = restarted(tmp_path).begin("t", replace(circle(), least=4), keys)
    with pytest.raises(UpdateRefused, match="joins secure sums of 4"):
        task.with_roster(frozenset("abc"), sealed_to(circle(), keys, OTHERS))


def test_a_call_that_comes_late_takes_back_nothing_that_was_fixed_meanwhile(tmp_path):
    """A thread goes on when its task is cancelled: it has the sum as it was, and writes it last."""
    memory = restarted(tmp_path)
    keys = memory.public_keys()
    sealed = sealed_to(circle(), keys, OTHERS)
    begun = memory.begin("t", circle(), keys)
    shared = memory.fix("t", begun.with_roster(EVERYBODY, sealed))
    sent = memory.fix("t", shared.with_masked(b"1" * 32))
    asked = memory.fix("t", sent.with_question(EVERYBODY))
    for late in (begun, shared, sent):
        assert memory.fix("t", late) == asked
        known = restarted(tmp_path).of("t")
        # Else it would answer for d's other secret now, and put its masks on another update.
        with pytest.raises(UpdateRefused, match="another question"):
            known.with_question(frozenset("abc"))
        with pytest.raises(UpdateRefused, match="masks"):
            known.masks(12)
    for other in (begun.with_roster(frozenset("abc"), sealed), shared.with_masked(b"2" * 32)):
        with pytest.raises(UpdateRefused, match="a device takes one"):
            memory.fix("t", other)


def test_masks_are_used_on_one_update_over_restarts(tmp_path):
    masked(tmp_path)
    known = restarted(tmp_path).of("t")
    assert known.with_masked(b"1" * 32) == known
    with pytest.raises(UpdateRefused, match="masked update"):
        known.with_masked(b"2" * 32)
    with pytest.raises(UpdateRefused, match="masks of this round are used"):
        known.masks(12)


def test_one_question_is_answered_over_restarts_and_so_one_secret_of_each_neighbour(tmp_path):
    masked(tmp_path)
    memory = restarted(tmp_path)
    asked = memory.fix("t", memory.of("t").with_question(EVERYBODY))
    proofs = asked.confirmations()
    again = restarted(tmp_path).of("t")
    assert again.with_question(EVERYBODY).confirmations() == proofs
    # The other question would tell the other secret of "d".
    with pytest.raises(UpdateRefused, match="another question"):
        again.with_question(frozenset("abc"))


def test_what_is_gone_or_damaged_answers_nothing(tmp_path):
    masked(tmp_path)
    (path,) = [path for path in (tmp_path / "secure").iterdir() if path.name != "key"]
    assert path.stat().st_mode & 0o777 == 0o600
    # It still reads as JSON: of another update.
    good = path.read_bytes()
    for damaged in (good.replace(b'"masked_digest": "31', b'"masked_digest": "32'), good[:-1], b"", b"{}"):
        assert damaged != good
        path.write_bytes(damaged)
        with pytest.raises(UpdateRefused, match="damaged"):
            restarted(tmp_path).of("t")
    path.unlink()
    with pytest.raises(UpdateRefused, match="knows nothing"):
        restarted(tmp_path).of("t")
    (tmp_path / "secure" / "key").write_bytes(b"short")
    assert restarted(tmp_path).public_keys() == restarted(tmp_path).public_keys()


def test_only_the_last_sums_are_kept(tmp_path):
    memory = restarted(tmp_path)
    for number in range(12):
        memory.begin(f"t{number}", circle(b"%d" % number), memory.public_keys())
    assert len([path for path in (tmp_path / "secure").iterdir() if path.name != "key"]) == 8
    with pytest.raises(UpdateRefused, match="knows nothing"):
        memory.of("t0")


def test_a_clock_that_fell_back_costs_no_sum_that_has_just_begun(tmp_path):
    memory = restarted(tmp_path)
    for number in range(8):
        memory.begin(f"old {number}", circle(b"%d" % number), memory.public_keys())
    # As on a device that starts in 1970 until it has asked for the time.
    for path in (tmp_path / "secure").iterdir():
        os.utime(path, (time.time() + 1e6,) * 2)
    memory.begin("new", circle(), memory.public_keys())
    assert memory.of("new").circle == circle()
    assert len([path for path in (tmp_path / "secure").iterdir() if path.name != "key"]) == 8


def test_nobody_else_may_read_what_a_device_remembers(tmp_path):
    masked(tmp_path)
    memory = restarted(tmp_path)
    memory.public_keys()
    found = [tmp_path / "secure", *(tmp_path / "secure").iterdir()]
    assert len(found) == 3
    assert [path.stat().st_mode & 0o077 for path in found] == [0] * 3
