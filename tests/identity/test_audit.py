"""Every line of an audit log is sealed to the one before, and what anybody can cause is bounded."""

import json
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgrpc.errors import CorruptError, UsageError
from fedgrpc.identity.audit import AuditEntry, AuditLog, Position, sealed_line
from tests.support.audit_lines import verified

ENTRY = AuditEntry(1.7e9, "the admin 'alice'", "10.0.0.5:4711", "Identity/RevokeMember", {"name": "pi-7"})


def written(path: Path, *entries: AuditEntry) -> list[bytes]:
    log = AuditLog(path)
    for entry in entries:
        log.record(entry)
    log.close()
    return path.read_bytes().splitlines(keepends=True)


def test_each_line_says_who_did_what_from_where_and_how_it_ended(tmp_path: Path) -> None:
    (line,) = written(tmp_path / "a", ENTRY)
    found = json.loads(line)
    assert {key: found[key] for key in found if key != "seal"} == {
        "n": 1,
        "at": "2023-11-14T22:13:20.000Z",
        "who": "the admin 'alice'",
        "from": "10.0.0.5:4711",
        "what": "Identity/RevokeMember",
        "about": {"name": "pi-7"},
        "result": "ok",
    }


def test_a_log_is_for_its_owner_alone(tmp_path: Path) -> None:
    written(tmp_path / "a", ENTRY)
    assert (tmp_path / "a").stat().st_mode & 0o077 == 0


def test_a_log_goes_on_where_a_former_process_ended(tmp_path: Path) -> None:
    written(tmp_path / "a", ENTRY, ENTRY)
    lines = written(tmp_path / "a", ENTRY)
    assert [end.count for _, end in verified(lines)] == [1, 2, 3]


def test_the_half_line_of_a_power_cut_is_removed(tmp_path: Path) -> None:
    lines = written(tmp_path / "a", ENTRY, ENTRY)
    (tmp_path / "a").write_bytes(lines[0] + lines[1][:-5])
    assert written(tmp_path / "a", ENTRY)[0] == lines[0]
    assert len(list(verified((tmp_path / "a").read_bytes().splitlines(keepends=True)))) == 2


@given(
    st.lists(st.builds(AuditEntry, st.floats(0, 4e9), st.text(), st.text(), st.text()), min_size=1, max_size=4),
    st.data(),
)
def test_a_change_of_any_byte_breaks_the_seal(entries: list[AuditEntry], data: st.DataObject) -> None:
    end, lines = Position(), []
    for entry in entries:
        line, end = sealed_line(entry, end)
        lines.append(line)
    whole = b"".join(lines)
    place = data.draw(st.integers(0, len(whole) - 1))
    other = data.draw(st.integers(0, 255).filter(lambda byte: byte != whole[place]))
    changed = whole[:place] + bytes([other]) + whole[place + 1 :]
    with pytest.raises(CorruptError):
        list(verified(changed.splitlines(keepends=True)))


@pytest.mark.parametrize("gone", [0, 1])
def test_a_removed_line_breaks_the_seal(tmp_path: Path, gone: int) -> None:
    lines = written(tmp_path / "a", ENTRY, ENTRY, ENTRY)
    with pytest.raises(CorruptError, match="removed"):
        list(verified(lines[:gone] + lines[gone + 1 :]))


def test_a_damaged_log_is_not_continued(tmp_path: Path) -> None:
    lines = written(tmp_path / "a", ENTRY, ENTRY)
    (tmp_path / "a").write_bytes(lines[0] + lines[1].replace(b"alice", b"mally"))
    with pytest.raises(UsageError, match="damaged"):
        AuditLog(tmp_path / "a")


def test_the_same_refusal_is_recorded_once_in_a_while_and_the_rest_counted(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "a")
    for second in range(1000):
        log.refuse(AuditEntry(1e9 + second, "pi-7", "peer", "Aggregator/PollTask", result="WrongIdentity: no"))
    log.close()
    first, second_line = [json.loads(line) for line in (tmp_path / "a").read_bytes().splitlines()]
    assert "refusals_left_out_before" not in first["about"]
    assert second_line["about"]["refusals_left_out_before"] == "599"


def test_refusals_of_many_callers_are_bounded(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "a")
    for number in range(1000):
        log.refuse(AuditEntry(1e9, f"pi-{number}", "peer", "Aggregator/PollTask", result="WrongIdentity: no"))
    log.close()
    assert len((tmp_path / "a").read_bytes().splitlines()) == 100


def test_a_line_has_bounded_texts(tmp_path: Path) -> None:
    long = "x\n" * 100_000
    (line,) = written(tmp_path / "a", AuditEntry(0, long, long, long, {str(i): long for i in range(100)}, long))
    assert len(line) < 8192


def test_one_caller_s_refusals_do_not_hide_those_of_others(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "a")
    for number in range(1000):
        log.refuse(AuditEntry(1e9, "pi-7", "peer", "Aggregator/Register", result=f"WrongIdentity: {number}"))
    log.refuse(AuditEntry(1e9, "alice", "peer", "Identity/RevokeMember", result="WrongIdentity: no"))
    log.close()
    found = [json.loads(line)["who"] for line in (tmp_path / "a").read_bytes().splitlines()]
    assert found == ["pi-7"] * 10 + ["alice"]


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_000,
        b'{"n":1e999,"seal":""}',
        b'{"n":' + b"9" * 10_000 + b',"seal":""}',
        b"[]",
        b"null",
        b"\xff\xfe",
        b"\0" * 5000,
    ],
)
def test_a_line_of_anything_is_damage_whether_it_is_read_or_continued(tmp_path: Path, line: bytes) -> None:
    with pytest.raises(CorruptError):
        list(verified([line + b"\n"]))
    (tmp_path / "a").write_bytes(line + b"\n" + line + b"\n")
    with pytest.raises(UsageError, match="damaged"):
        AuditLog(tmp_path / "a")


def test_a_sealed_line_without_the_fields_of_an_entry_is_damage() -> None:
    record = {"n": 1}
    seal = sha256(bytes(32) + json.dumps(record, separators=(",", ":")).encode()).hexdigest()
    line = json.dumps({**record, "seal": seal}, separators=(",", ":")).encode() + b"\n"
    with pytest.raises(CorruptError, match="fields"):
        list(verified([line]))


def test_a_long_tail_of_anything_is_not_cut_off(tmp_path: Path) -> None:
    lines = written(tmp_path / "a", ENTRY)
    content = lines[0] + b"\0" * (1 << 20)
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(UsageError, match="damaged"):
        AuditLog(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == content
