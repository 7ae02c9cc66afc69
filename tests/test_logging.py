from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import structlog

from fedgrpc.errors import UsageError
from fedgrpc.logging import configure


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    structlog.reset_defaults()
    root.handlers[:], root.level = handlers, level


def _logged(log_format: str, **values: object) -> str:
    stream = io.StringIO()
    configure("info", log_format, stream)
    structlog.get_logger().info("something_happened", **values)
    return stream.getvalue()


def test_lines_are_json_where_there_is_no_terminal() -> None:
    line = json.loads(_logged("auto", answer=42))
    assert line["event"] == "something_happened"
    assert line["answer"] == 42
    assert line["level"] == "info"
    assert line["timestamp"].endswith("Z")


def test_a_line_that_cannot_be_written_is_lost_and_nothing_else(tmp_path: Path) -> None:
    """A full disk, or a pipe whose reader has gone, must not end what the log is about."""
    with (tmp_path / "log").open("w") as stream:
        configure("info", "json", stream)
    structlog.get_logger().info("into a closed file")
    logging.getLogger("other").warning("into a closed file")
    full = Path("/dev/full").open("w")  # noqa: SIM115 - closing it fails, too
    configure("info", "json", full)
    structlog.get_logger().info("onto a full disk")
    with contextlib.suppress(OSError):
        full.close()


def test_run_round_and_worker_come_right_after_the_event_and_from_the_context() -> None:
    stream = io.StringIO()
    configure("info", "json", stream)
    with structlog.contextvars.bound_contextvars(run="default", round=3):
        structlog.get_logger().info("task_started", kind="train", worker="pi-1")
    line = json.loads(stream.getvalue())
    assert list(line) == ["timestamp", "level", "event", "run", "round", "worker", "kind"]
    assert (line["run"], line["round"], line["worker"]) == ("default", 3, "pi-1")


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_task_token_is_never_written_however_deep_it_sits(log_format: str) -> None:
    out = _logged(
        log_format, token="s3cret", task={"worker": "pi-1", "token": "s3cret", "more": [{"token": "s3cret"}]}
    )
    assert "s3cret" not in out
    assert "pi-1" in out


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_tensor_data_is_never_written(log_format: str) -> None:
    tensor = np.full((3, 5), 1.2345, dtype=np.float32)
    values = {"array": tensor, "data": tensor.tobytes(), "many": {str(i): tensor for i in range(3)}}
    out = _logged(log_format, **values, long=[1.2345] * 1000)
    assert "1.2345" not in out
    assert "<float32 [3, 5]>" in out
    assert "<60 bytes>" in out


def test_the_traceback_of_a_surprise_shows_no_local_variables() -> None:
    stream = io.StringIO()
    configure("info", "console", stream)
    token = "s3cret" * 2
    try:
        raise RuntimeError("surprise", len(token))
    except RuntimeError as error:
        structlog.get_logger().error("call_failed", exc_info=error)
    assert "surprise" in stream.getvalue()
    assert "s3crets3cret" not in stream.getvalue()


def test_a_numpy_number_is_a_number() -> None:
    assert json.loads(_logged("json", loss=np.float32(0.5)))["loss"] == 0.5


def test_lines_below_the_level_are_dropped() -> None:
    stream = io.StringIO()
    configure("warning", "json", stream)
    structlog.get_logger().info("quiet")
    structlog.get_logger().warning("loud")
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["loud"]


def test_libraries_that_use_standard_logging_come_out_in_the_same_form() -> None:
    stream = io.StringIO()
    configure("info", "json", stream)
    logging.getLogger("asyncio").warning("slow callback %s", "x")
    logging.getLogger("asyncio").info("not this")
    (line,) = map(json.loads, stream.getvalue().splitlines())
    assert line["event"] == "slow callback x"
    assert line["level"] == "warning"
    assert line["logger"] == "asyncio"


@pytest.mark.parametrize(("level", "log_format"), [("loud", "json"), ("info", "xml")])
def test_an_unknown_level_or_format_is_a_usage_error(level: str, log_format: str) -> None:
    with pytest.raises(UsageError, match="choose"):
        configure(level, log_format)
