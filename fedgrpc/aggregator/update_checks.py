"""Checks of an update: of its header before the first byte, and of its tensors before it counts.

The rule: pure functions of the update and of what its task asks for. A refusal is final, so it comes before the
bytes wherever the header shows the fault.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fedgrpc.aggregation.admission import (
    AdmissionPolicy,
    TensorLike,
    check_layout,
    check_values,
    check_variances,
)
from fedgrpc.aggregation.partial_aggregate import check_partial_aggregate, partial_aggregate_values
from fedgrpc.aggregation.partial_update import unpack_all
from fedgrpc.aggregator.first_model import complaint
from fedgrpc.codec.layout import Layout
from fedgrpc.codec.manifest import Limits, Manifest
from fedgrpc.codec.payload import EARLY_CUT_BYTES
from fedgrpc.codec.raw import Raw
from fedgrpc.errors import UpdateRefused
from fedgrpc.privacy.masks import packed_bytes
from fedgrpc.privacy.secure_policy import LEAST_DEVICES
from fedgrpc.protocol.secure import MASKED
from fedgrpc.protocol.tensors import layout_to_proto, manifest_from_proto
from fedgrpc.protocol.updates import report_from_proto
from fedgrpc.rounds.policy import TaskKind
from fedgrpc.rpc.channel import MAX_MESSAGE_BYTES
from fedgrpc.runs.task_context import LocalTask, Report
from fedgrpc.runs.weighing import Weighing
from fedgrpc.storage.update_file import StoredUpdate, UpdateFile
from fedgrpc.submodels.channels import KeptChannels
from fedgrpc.v1.aggregator_pb2 import UpdateHeader

# What is decoded at a time. One update takes its frames and pieces, and this many arrays of its largest tensor.
DECODING_BYTES = 64 << 20
_BESIDE_BYTES = 8 << 20
_ARRAYS = 4
# What a header has beside its manifest; what an entry has beside its name and shape; entries for a tensor, and as
# much again for its channels; bytes of one frame's sizes; element, float64 weight and rest of a mean.
_OTHER_BYTES = 64 << 10
_ENTRY_BYTES = 128
_LISTED = 4
_FRAME_BYTES = 16
_MOST_BYTES_AN_ELEMENT = 8 + 8 + 8

Values = Iterator[tuple[TensorLike, np.ndarray]]


@dataclass(frozen=True)
class MaskedWords:
    """The words of a masked update: how many, and of how many bits."""

    count: int
    bits: int

    @property
    def size_bytes(self) -> int:
        """Bytes that they take."""
        return packed_bytes(self.count, self.bits)

    def check(self, stored: StoredUpdate) -> None:
        """Raise `UpdateRefused` unless there are zeros behind the last word: the whole sum would be lost."""
        with stored.open() as reader:
            last = int(reader.tensor(MASKED)[-1])
        if self.count * self.bits % 8 and last >> (self.count * self.bits % 8):
            raise UpdateRefused("there are bits behind the last word of this masked update")


@dataclass(frozen=True)
class ExpectedUpdate:
    """Demands of a task on its update.

    `layout` is that of the model. `local` and `kept` say what the worker was given; `kept` None: all channels.
    `leads`: the worker is an aggregator, which may send a mean. `masked`: its words, where it goes into a
    secure sum; None: it travels as it is. `summed`: it is the sum that an aggregator has of masked updates.
    """

    kind: TaskKind
    layout: Layout
    local: LocalTask
    kept: KeptChannels | None
    leads: bool
    limits: Limits
    admission: AdmissionPolicy
    max_model_bytes: int
    weighing: Weighing
    masked: MaskedWords | None = None
    summed: bool = False

    def takes_plain(self, header: UpdateHeader) -> bool:
        """Return whether it is one device's update of the whole model, which its own bytes suffice to check."""
        trains = self.kind is TaskKind.TRAIN and self.masked is None
        return trains and self.local.plain and not header.merged_updates


def examine(header: UpdateHeader, expected: ExpectedUpdate) -> tuple[Manifest, Report]:
    """Check all that can be known before the first byte.

    An update without a count of examples gets the one that its kind implies, in `header` too, which is stored.
    Raises `LayoutError`, `TooLargeError` and `UpdateRefused`.
    """
    manifest = manifest_from_proto(header.manifest, expected.limits)
    if header.merged_updates and not expected.leads:
        raise UpdateRefused("a mean of updates comes from an aggregator alone")
    if header.merged_updates and expected.weighing.cohort is not None:
        raise UpdateRefused("this run bounds what each device adds, and a mean of updates is of many")
    if expected.kind is TaskKind.EVALUATE:
        header.example_count = header.example_count or header.evaluation_example_count
        check_layout((), manifest.layout)
    elif expected.kind is TaskKind.INITIALIZE:
        header.example_count = header.example_count or 1
        _check_initial(manifest, expected.max_model_bytes)
    elif expected.summed and header.merged_updates < LEAST_DEVICES:
        told = f"this one is of {header.merged_updates}"
        raise UpdateRefused(f"an update of this run is a secure sum of {LEAST_DEVICES} devices or more, {told}")
    elif expected.masked is not None:
        _check_masked(header, manifest, expected.masked.size_bytes)
    elif header.merged_updates:
        check_partial_aggregate(expected.layout, manifest.layout)
    elif expected.local.plain:
        check_layout(expected.layout, manifest.layout)
    else:
        expected.local.check_layout(expected.layout, manifest.layout, expected.kept)
    report = report_from_proto(header, expected.admission)
    if expected.weighing.algorithm.normalizes and expected.kind is TaskKind.TRAIN:
        expected.weighing.check_steps(report)
    return manifest, report


def verify(stored: StoredUpdate, expected: ExpectedUpdate) -> None:
    """Check the tensors of an update whose bytes are all here. Raises `CodecError` and `UpdateRefused`."""
    if expected.kind is TaskKind.EVALUATE:
        return
    if expected.masked is not None:
        # Masked values look like any others: devices check theirs, and the sum is checked.
        expected.masked.check(stored)
        return
    if expected.takes_plain(stored.header):
        check_plain(stored, expected.admission)
        return
    file, policy, layout = stored.open(), expected.admission, expected.layout
    variances = tuple(spec for spec in layout or stored.manifest.layout if spec.is_variance)
    with file as reader:
        if expected.kind is TaskKind.INITIALIZE:
            # A statistic without any measurement yet, or a mask, may be infinite.
            check_values(((spec, values) for spec, values in file.pieces() if spec.is_trained), policy)
            check_variances((spec, reader.tensor(spec.name)) for spec in variances if spec.name in reader.names)
        else:
            check_values(_decoded(file, stored.header, layout, expected.kept), policy)
            check_variances(_decoded(file, stored.header, variances, expected.kept))


def check_plain(stored: StoredUpdate, policy: AdmissionPolicy) -> None:
    """Check the tensors of one device's update of the whole model. Raises `CodecError` and `UpdateRefused`."""
    file = stored.open()
    with file as reader:
        _check_plain(file, policy)
        variances = (spec for spec in stored.manifest.layout if spec.is_variance)
        check_variances((spec, reader.tensor(spec.name)) for spec in variances)


def _check_masked(header: UpdateHeader, manifest: Manifest, size_bytes: int) -> None:
    """Refuse all but the bytes of one masked vector, whose weight is within."""
    layout = [(spec.name, spec.dtype, spec.shape) for spec in manifest.layout]
    if layout != [(MASKED, "uint8", (size_bytes,))] or any(each.encoding != Raw() for each in manifest.entries):
        raise UpdateRefused(f"an update of a secure sum is {size_bytes} bytes in one raw tensor {MASKED!r}")
    if header.merged_updates or header.example_count != 1:
        raise UpdateRefused(
            "an update of a secure sum is of one device, and says one example: its weight is within"
        )


def norm_of(stored: StoredUpdate, layout: Layout, plain: bool, kept: KeptChannels | None) -> float:
    """Return the L2 norm of the differences of an update; `kept` are the channels of one that is not `plain`.

    Raises as reading it does, and `UpdateRefused` for what admission would refuse.
    """
    file = stored.open()
    with file:
        whole = plain and not stored.header.merged_updates
        values = file.long_pieces() if whole else _decoded(file, stored.header, layout, kept)
        return check_values(values, AdmissionPolicy())


def _decoded(file: UpdateFile, header: UpdateHeader, layout: Layout, kept: KeptChannels | None) -> Values:
    """Tensors of `layout` as a mean or a partial update stands for them."""
    reader = file.reader
    if header.merged_updates:
        return partial_aggregate_values(layout, reader.names, reader.tensor, header.weight)
    return unpack_all(layout, reader.names, reader.tensor, kept)


def _check_plain(update: UpdateFile, policy: AdmissionPolicy) -> None:
    # Bounds of quantized tensors come from their scales alone: a norm within its limit needs no decoding.
    values = update.long_pieces() if math.isfinite(policy.max_norm) else update.bounds()
    try:
        check_values(values, policy)
    except UpdateRefused:
        # Only a refused update is read again, tensor by tensor, to name the one at fault.
        check_values(update.pieces(), policy)
        raise


def _check_initial(manifest: Manifest, max_bytes: int) -> None:
    """Refuse lossy initial weights, as in no file: every worker starts from exactly these."""
    if not manifest.entries:
        raise UpdateRefused("initial weights are wanted, and the update has no tensors")
    for entry in manifest.entries:
        if not entry.encoding.lossless:
            raise UpdateRefused(f"initial weights come lossless, {entry.spec.name!r} is {entry.encoding}")
    if wrong := complaint(manifest.layout, max_bytes):
        raise UpdateRefused(f"these initial weights cannot be a model: {wrong}")


def decoding_bytes(manifest: Manifest) -> int:
    """Memory that `verify` may take: a few arrays of one tensor at a time."""
    return _BESIDE_BYTES + _ARRAYS * max((spec.nbytes for spec in manifest.layout), default=0)


def max_header_bytes(layout: Layout) -> int:
    """Size of the largest header of an update to a model of that layout; of any model where there is none.

    A partial update or a mean lists up to three tensors for one of the model's (NAME, NAME#mask, NAME#codes), with
    float64 weights among them; the channels of the model come beside its manifest.
    """
    if not layout:
        return MAX_MESSAGE_BYTES
    entries = sum(spec.ByteSize() + _ENTRY_BYTES for spec in layout_to_proto(layout))
    frames = _FRAME_BYTES * sum(spec.size for spec in layout) * _MOST_BYTES_AN_ELEMENT // EARLY_CUT_BYTES
    return min(MAX_MESSAGE_BYTES, _OTHER_BYTES + _LISTED * entries + frames)
