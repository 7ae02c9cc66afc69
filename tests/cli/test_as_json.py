"""Messages as JSON that programs can read without knowing protobuf."""

from __future__ import annotations

import json
import math

import pytest

from fedgrpc.cli.as_json import json_text, plain, settings
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import round_pb2


def _round() -> round_pb2.Round:
    record = round_pb2.Round(phase=round_pb2.ROUND_PHASE_COMMITTED, kind=round_pb2.TASK_KIND_INITIALIZE)
    record.tasks.add(worker="pi", example_count=721, phase=round_pb2.TASK_PHASE_ACCEPTED, metrics={"loss": 0.5})
    record.deadline.FromMilliseconds(600_500)
    return record


def test_numbers_are_numbers_enums_are_words_and_durations_are_seconds() -> None:
    read = json.loads(json_text(plain(_round())))
    assert (read["number"], read["phase"], read["kind"], read["deadline"]) == (0, "committed", "initialize", 600.5)
    task = read["tasks"][0]
    assert (task["example_count"], task["phase"], task["metrics"]) == (721, "accepted", {"loss": 0.5})
    assert "time_left" not in read
    assert "prediction" not in task


def test_an_enum_of_a_newer_version_stays_a_number() -> None:
    assert (
        plain(round_pb2.Round.FromString(round_pb2.Round(phase=4).SerializeToString()[:1] + b"\x63"))["phase"]
        == 99
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_does_not_have_becomes_null(value: float) -> None:
    text = json_text({"a": [value], "b": {"c": (1, value)}})
    assert json.loads(text, parse_constant=lambda constant: pytest.fail(constant)) == {
        "a": [None],
        "b": {"c": [1, None]},
    }


def test_bytes_are_hex_and_times_are_iso() -> None:
    run = pb.Run(name="r")
    run.started_at.FromSeconds(0)
    assert plain(run)["started_at"] == "1970-01-01T00:00:00Z"
    assert plain(pb.PollTaskRequest(held_digest=b"\x01\xff"))["held_digest"] == "01ff"


def test_settings_that_are_numbers_and_booleans_come_as_such() -> None:
    texts = {
        "evaluate": "True",
        "seed": "5",
        "policy.deadline_s": "600.0",
        "upload_recipe": "int8+zstd",
        "x": "-3",
    }
    assert settings(texts) == {
        "evaluate": True,
        "policy.deadline_s": 600.0,
        "seed": 5,
        "upload_recipe": "int8+zstd",
        "x": -3,
    }
