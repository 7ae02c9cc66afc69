"""Figures as event files of TensorBoard, by its own library: torch is not needed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedgrpc.errors import ExtraMissing


class TensorBoard:
    """A `Tracker`. Each run has a folder of its name below `target`."""

    def __init__(self, target: str) -> None:
        """Raises `UsageError` without the library."""
        try:
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise ExtraMissing.of("the tracker tensorboard", "tensorboard", error) from None
        self._open, self._folder = EventFileWriter, Path(target)
        self._writer: Any = None

    def begin(self, run: str, settings: Mapping[str, str]) -> None:
        """Open the event file of a run, with the settings as a text."""
        self._writer = self._open(str(self._folder / run))
        lines = "\n".join(f"    {name} = {value}" for name, value in sorted(settings.items()))
        self._add(_text("settings", lines), 0, None)

    def log(self, step: int, values: Mapping[str, float], at_s: float) -> None:
        """Add a scalar for each figure."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(Summary(value=scalars), step, at_s)
        self._writer.flush()

    def _add(self, summary: Any, step: int, at_s: float | None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(summary=summary, step=step, wall_time=at_s or 0.0))

    def end(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()


def _text(tag: str, text: str) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

    about = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    tensor = TensorProto(dtype="DT_STRING", string_val=[text.encode()], tensor_shape=shape)
    return Summary(value=[Summary.Value(tag=tag, metadata=about, tensor=tensor)])
