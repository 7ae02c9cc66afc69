"""Logs: readable lines on a terminal, one JSON object a line otherwise.

The rule: a line is an event name with a few small values. What a task token, a key or a tensor is worth is
never written, whoever logs it and however deep it sits: this module masks it on the way out.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Mapping
from typing import Any, Final, TextIO, cast

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from fedgrpc.errors import UsageError

LEVELS: Final = ("debug", "info", "warning", "error")
FORMATS: Final = ("auto", "console", "json")

# A line about a round says where it belongs before it says anything else.
_FIRST_KEYS: Final = ("timestamp", "level", "event", "run", "round", "worker")
_SECRET_KEYS: Final = frozenset({"token", "tokens", "password", "secret", "key", "authorization"})
_MAX_TEXT_CHARS: Final = 1000
_MAX_ITEMS: Final = 20
_MAX_DEPTH: Final = 3
_chosen = ("info", "auto")
_SCALARS: Final = (bool, int, float, type(None))


def configure(level: str = "info", log_format: str = "auto", stream: TextIO | None = None) -> None:
    """Send every log line of this process to `stream` (standard error), from `level` up.

    `log_format` auto is console on a terminal and json elsewhere. Libraries that use the standard logging
    come out in the same form, from warning up.

    Raises:
        UsageError: there is no such level or format.
    """
    global _chosen
    _chosen = level, log_format
    _configure_standard_logging(*configure_own(level, log_format, stream))


def chosen() -> tuple[str, str]:
    """Return level and format that this process was configured with, for a process that it starts."""
    return _chosen


def configure_own(
    level: str, log_format: str = "auto", stream: TextIO | None = None
) -> tuple[list[Processor], list[Processor], TextIO]:
    """Do as `configure`, but leave the standard logging as it is: it belongs to the program around fedgrpc.

    Returns the processors that other loggers may share, those that render, and where they write. Raises likewise.
    """
    if level not in LEVELS:
        raise UsageError(f"there is no log level {level!r}: choose {', '.join(LEVELS)}")
    if log_format not in FORMATS:
        raise UsageError(f"there is no log format {log_format!r}: choose {', '.join(FORMATS)}")
    stream = stream or sys.stderr
    console = log_format == "console" or (log_format == "auto" and stream.isatty())
    output = cast(TextIO, _Lossy(stream))
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper("%H:%M:%S" if console else "iso", utc=not console),
        mask,
        in_order,
        *([short] if console else []),
    ]
    renderer = _console_renderer(stream) if console else _json_renderer()
    number = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[*shared, *renderer],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(output),
    )
    return shared, renderer, output


class _Lossy:
    """Stream that drops what cannot be written (a full disk, a pipe that nobody reads), and nothing else."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


def mask(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Secrets become "***"; bytes, arrays and other large values are named by their size."""
    return {key: _masked(key, value, 0) for key, value in event.items()}


def in_order(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Time, level, event, run, round and worker first; the rest as the caller wrote it."""
    first = {key: event[key] for key in _FIRST_KEYS if key in event}
    return {**first, **event}


def short(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Numbers for people: six digits."""
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in event.items()}


def _masked(key: object, value: Any, depth: int) -> Any:
    """A small value that stands for `value`; exceptions are left to their renderer."""
    if isinstance(key, str) and key.lower() in _SECRET_KEYS and value is not None:
        return "***"
    if isinstance(value, _SCALARS) or key == "exc_info":
        return value
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{memoryview(value).nbytes} bytes>"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return _masked_array(value)
    if isinstance(value, Mapping):
        if depth == _MAX_DEPTH or len(value) > _MAX_ITEMS:
            return f"<{len(value)} entries>"
        return {str(name): _masked(name, item, depth + 1) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        if depth == _MAX_DEPTH or len(value) > _MAX_ITEMS:
            return f"<{len(value)} items>"
        return [_masked(None, item, depth + 1) for item in value]
    return _clipped(str(value))


def _masked_array(value: Any) -> Any:
    """A NumPy scalar is a number like any other; everything else is named by type and shape."""
    if value.shape == () and hasattr(value, "item") and isinstance(value.item(), _SCALARS):
        return value.item()
    return f"<{value.dtype} {list(value.shape)}>"


def _clipped(text: str) -> str:
    return text if len(text) <= _MAX_TEXT_CHARS else f"{text[:_MAX_TEXT_CHARS]}... ({len(text)} characters)"


def _console_renderer(stream: TextIO) -> list[Processor]:
    # The renderer's own choice, rich, prints the local variables of every frame: tensors and tokens.
    plain = structlog.dev.plain_traceback
    return [
        structlog.dev.ConsoleRenderer(colors=stream.isatty(), exception_formatter=plain, sort_keys=False),
    ]


def _json_renderer() -> list[Processor]:
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]


def _configure_standard_logging(shared: list[Processor], renderer: list[Processor], stream: TextIO) -> None:
    handler = logging.StreamHandler(stream)
    drop_meta = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name], processors=[drop_meta, *shared, *renderer]
        )
    )
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
