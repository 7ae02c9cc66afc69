"""`fedgrpc plan`: what plans would cost a device, before anything is trained."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fedgrpc.cli.main import run

DIGITS = ("plan", "--task", "fedgrpc.tasks.digits")


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The first device's JSON."""
    assert run([*DIGITS, "--json", *arguments]) == 0
    first: dict[str, Any] = json.loads(capsys.readouterr().out)[0]
    return first


def test_each_plan_has_its_times_memory_and_bytes_and_the_first_that_fits_is_chosen(
    capsys: pytest.CaptureFixture[str],
) -> None:
    described = ("--local-time", "10s", "--uplink", "1mbit", "--downlink", "4mbit", "--memory", "8GB")
    found = answer(capsys, *described, "--deadline", "10s")
    whole, half, quarter = found["plans"]
    assert whole["local_s"] == pytest.approx(10)
    assert whole["upload_s"] == pytest.approx(8 * whole["upload_bytes"] / 1e6)
    assert whole["download_s"] == pytest.approx(8 * whole["download_bytes"] / 4e6)
    assert whole["total_s"] > half["total_s"] > quarter["total_s"]
    assert whole["upload_bytes"] > half["upload_bytes"] > quarter["upload_bytes"]
    assert whole["misfit"].startswith("takes 10.1 s of 10")
    assert found["chosen"] == half["plan"] == "width = 0.5\n"
    assert found["reason"] == "a larger one takes 10.1 s of 10"


def test_a_table_marks_the_plan_that_is_chosen_and_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*DIGITS, "--memory", "128MB"]) == 0
    shown = capsys.readouterr().out
    assert "*  width = 0.25" in shown
    assert re.search(r"chosen: width = 0.25: none fits: the smallest takes \d+ MiB of 122", shown)


def test_this_device_is_measured_and_so_are_the_tensors_that_training_takes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = answer(capsys, "--measure", "2")
    assert found["measured_tasks"] == 3
    whole, _, quarter = found["plans"]
    assert whole["local_s"] > 0
    assert whole["peak_memory_bytes"] > 50 << 20
    assert quarter["peak_memory_bytes"] > 50 << 20


def test_each_plan_of_a_file_is_measured_as_it_is_and_what_saves_nothing_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = """
        [[automatic]]
        arithmetic.format = "fixed16.10"
        [[automatic]]
        memory.checkpoint = true
        [[automatic]]
    """
    (tmp_path / "plans.toml").write_text(plans)
    assert run([*DIGITS, "--plans", str(tmp_path / "plans.toml"), "--measure", "3", "--json"]) == 0
    shown = capsys.readouterr()
    (found,) = json.loads(shown.out)
    emulated, checkpointed, whole = found["plans"]
    assert emulated["local_s"] > whole["local_s"]
    assert "emulated number format saves neither memory, time nor bytes" in emulated["note"]
    assert whole["note"] == ""
    # The model of digits has no blocks, so its checkpoints are priced by formula.
    assert "memory.checkpoint = true cannot be trained here" in shown.err
    assert found["measured_tasks"] == 2
    assert checkpointed["local_s"] == pytest.approx(whole["local_s"] * checkpointed["technique"]["time"])


def test_plans_come_from_the_same_file_as_the_aggregators(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plans.toml").write_text("[[automatic]]\n[[automatic]]\nwidth = 0.5\npruning.ratio = 0.3\n")
    found = answer(capsys, "--plans", str(tmp_path / "plans.toml"))
    assert [each["plan"] for each in found["plans"]] == ["", "width = 0.5\n\n[pruning]\nratio = 0.3\n"]
    assert found["chosen"] == ""


def test_a_worker_is_of_an_aggregator(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*DIGITS, "--worker", "pi-1"]) == 2
    assert "--aggregator" in capsys.readouterr().err


def test_what_no_width_makes_narrower_is_told_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*DIGITS, "--model", "shufflenetv2"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("kept whole")]
    assert any(" more: view() is not understood" in line for line in lines)
    assert any(line.endswith("it is a grouped convolution") for line in lines)
    assert run(DIGITS) == 0
    assert "kept whole" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"\xff", "is not UTF-8 text"),
        (b"[pi]\nwdith = 1", "the plan of pi has no 'wdith'"),
        (b"[", "not valid TOML"),
    ],
)
def test_a_file_of_plans_that_cannot_be_used_is_named(
    content: bytes, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plans.toml").write_bytes(content)
    assert run([*DIGITS, "--plans", str(tmp_path / "plans.toml")]) == 2
    told = capsys.readouterr().err
    assert complaint in told
    assert "plans.toml" in told
