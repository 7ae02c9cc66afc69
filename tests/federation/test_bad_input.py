"""Issue: bad input gets "the right gRPC status", and "one worker's fault never ends the run".

In each test one device of two sends something wrong; afterwards the other's update makes the round.
"""

import asyncio
from contextlib import asynccontextmanager

import grpc
import numpy as np
import pytest
import zstandard

from fedgrpc.codec.digest import digest_of
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import device_pb2, round_pb2, tensor_pb2
from tests.support.hand_driven_device import MODEL, chunk, chunks, encoded, refused, update_of
from tests.support.running_federation import running_aggregator


@asynccontextmanager
async def two_devices(tmp_path, **changes):
    """(running, bad, its task, good, its task)."""
    async with running_aggregator(tmp_path, **changes) as running:
        bad, good = await running.device("bad"), await running.device("good")
        task, good_task = await asyncio.gather(bad.task(), good.task())
        yield running, bad, task, good, good_task


async def finishes_without(running, good, task, reason):
    """The round is committed from the good update alone, and the record says why the bad one was refused."""
    assert (await good.push(task)).complete
    await running.until_finished()
    round_ = await running.round()
    phases = {item.worker: item for item in round_.tasks}
    assert round_.phase == round_pb2.ROUND_PHASE_COMMITTED
    assert phases["good"].phase == round_pb2.TASK_PHASE_ACCEPTED
    assert phases["bad"].phase == round_pb2.TASK_PHASE_REJECTED
    assert reason in phases["bad"].reason
    assert_moved_by(running, 1.0)


async def finishes_with_both(running, bad, bad_task, good, good_task):
    """What went wrong was no fault of the update: sent as it should be, it counts, once."""
    held = await bad.held(bad_task)
    if not held.complete:
        offset = held.committed_size_bytes
        assert (await bad.push(bad_task, update_of(3.0), offset=offset, example_count=30)).complete
    assert (await good.push(good_task)).complete
    await running.until_finished()
    assert {item.phase for item in (await running.round()).tasks} == {round_pb2.TASK_PHASE_ACCEPTED}
    assert_moved_by(running, (30 * 3.0 + 10 * 1.0) / 40)


def assert_moved_by(running, change):
    weights = running.weights(2)
    np.testing.assert_allclose(weights["w"], MODEL["w"] + change, rtol=1e-6)
    np.testing.assert_allclose(weights["b"], MODEL["b"] + change, rtol=1e-6)
    assert weights["n"] == 4


def without(name):
    tensors = update_of()
    del tensors[name]
    return tensors


def with_value(name, index, value):
    tensors = update_of()
    tensors[name][index] = value
    return tensors


FINAL_TENSORS = {
    "another model": ({"layer": np.zeros((3, 3), np.float32)}, "tensor 'b' is missing, and 2 more"),
    "a missing tensor": (without("b"), "tensor 'b' is missing"),
    "an extra tensor": ({**update_of(), "x": np.zeros(2, np.float32)}, "the model has no tensor 'x'"),
    "a wrong shape": ({**update_of(), "b": np.zeros((1, 40), np.float32)}, "'b' is float32[1, 40], the model's"),
    "a broadcastable shape": ({**update_of(), "b": np.zeros(1, np.float32)}, "'b' is float32[1], the model's is"),
    "a wrong dtype": (
        {**update_of(), "b": np.zeros(40, np.float64)},
        "'b' is float64[40], the model's is float32",
    ),
    "no tensors": ({}, "tensor 'b' is missing"),
}


@pytest.mark.parametrize("what", FINAL_TENSORS)
async def test_an_update_that_does_not_fit_the_model_is_refused_for_good(tmp_path, what):
    tensors, reason = FINAL_TENSORS[what]
    async with two_devices(tmp_path) as (running, bad, bad_task, good, good_task):
        with refused("INVALID_ARGUMENT", reason, "UpdateRefused"):
            await bad.push(bad_task, tensors)
        with refused("FAILED_PRECONDITION", "the task is rejected: ", "RoundClosed"):
            await bad.push(bad_task)
        await finishes_without(running, good, good_task, reason)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
async def test_a_value_that_is_not_finite_is_refused_for_good(tmp_path, value):
    """The codec refuses to write one, so the bytes are made by hand."""
    manifest, payload = encoded(update_of())
    poisoned = bytearray(payload)
    poisoned[400:404] = np.float32(value).tobytes()
    manifest.digest = digest_of(poisoned)
    async with two_devices(tmp_path) as (running, bad, task, good, good_task):
        header = pb.PushUpdateRequest(header=bad.header(task, manifest))
        with refused("INVALID_ARGUMENT", "tensor 'w' has values that are not finite", "UpdateRefused"):
            await bad.send(header, *chunks(bytes(poisoned)))
        await finishes_without(running, good, good_task, "not finite")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"example_count": 0}, "example count 0 is not from 1"),
        ({"example_count": 2**64 - 1}, "example count 18446744073709551615 is not from 1 to"),
        ({"metrics": {"loss": float("nan")}}, "metric 'loss' is nan"),
        ({"metrics": {str(i): 1.0 for i in range(65)}}, "65 metrics are reported"),
        ({"evaluation_metrics": {"x" * 65: 1.0}}, "1 to 64 printable characters"),
        ({"timings": device_pb2.Timings(local_seconds=-1.0)}, "a timing of -1.0 seconds cannot be"),
        ({"timings": device_pb2.Timings(download_seconds=float("inf"))}, "a timing of inf seconds cannot be"),
    ],
)
async def test_a_header_with_impossible_numbers_is_refused_for_good(tmp_path, changes, reason):
    """A negative example count cannot travel as uint64: it comes as one beyond every bound."""
    async with two_devices(tmp_path) as (running, bad, task, good, good_task):
        with refused("INVALID_ARGUMENT", reason):
            await bad.push(task, **changes)
        await finishes_without(running, good, good_task, reason)


async def test_a_norm_over_the_bound_is_refused_for_good(tmp_path):
    async with two_devices(tmp_path, max_update_norm=100.0) as (running, bad, task, good, good_task):
        with refused("INVALID_ARGUMENT", "norm 451.664 is over the bound 100", "UpdateRefused"):
            await bad.push(task, update_of(10.0))
        await finishes_without(running, good, good_task, "is over the bound")


def oversized(manifest):
    manifest.size_bytes = 10**12


def unknown_encoding(manifest):
    manifest.entries[0].encoding.spec = "telepathy"


def unknown_dtype(manifest):
    manifest.entries[0].tensor.dtype = 99


def unknown_compression(manifest):
    manifest.compression = 42


def short_digest(manifest):
    manifest.digest = b"short"


def named_twice(manifest):
    manifest.entries.append(manifest.entries[0])
    manifest.size_bytes += manifest.entries[0].size_bytes


def endless_shape(manifest):
    manifest.entries[0].tensor.shape[:] = [2**40, 2**40]


def too_many_dimensions(manifest):
    manifest.entries[0].tensor.shape[:] = [1] * 17


def sizes_that_do_not_add_up(manifest):
    manifest.entries[0].size_bytes -= 1


def bomb(manifest):
    """Three kilobytes that say they hold eight terabytes."""
    manifest.compression = tensor_pb2.COMPRESSION_ZSTD
    frames = [tensor_pb2.Frame(size_bytes=1, content_size_bytes=8 << 20) for _ in range(1000)]
    manifest.frames.extend(frames)
    manifest.size_bytes = 1000


@pytest.mark.parametrize(
    ("spoil", "code", "reason"),
    [
        (oversized, "RESOURCE_EXHAUSTED", "declares 1000000000000 payload bytes, the limit is 1048576"),
        (unknown_encoding, "INVALID_ARGUMENT", "unknown encoding 'telepathy'"),
        (unknown_dtype, "INVALID_ARGUMENT", "unknown dtype number 99"),
        (unknown_compression, "INVALID_ARGUMENT", "unknown compression number 42"),
        (short_digest, "INVALID_ARGUMENT", "digest has 5 bytes"),
        (named_twice, "INVALID_ARGUMENT", "names a tensor twice"),
        (endless_shape, "INVALID_ARGUMENT", "impossible shape"),
        (too_many_dimensions, "INVALID_ARGUMENT", "17 dimensions"),
        (sizes_that_do_not_add_up, "INVALID_ARGUMENT", "declares 7999 bytes"),
        (bomb, "INVALID_ARGUMENT", "1000 frames"),
    ],
)
async def test_a_declaration_that_cannot_be_is_refused_before_its_first_byte(tmp_path, spoil, code, reason):
    manifest, payload = encoded(update_of())
    spoil(manifest)
    async with two_devices(tmp_path, max_payload_bytes=1 << 20) as (running, bad, task, good, good_task):
        with refused(code, reason):
            await bad.send(pb.PushUpdateRequest(header=bad.header(task, manifest)), *chunks(payload))
        await finishes_without(running, good, good_task, reason)


def zstd_manifest(frame):
    """The manifest of an honest update, over one frame of other bytes."""
    manifest, payload = encoded(update_of())
    manifest.compression = tensor_pb2.COMPRESSION_ZSTD
    manifest.frames.add(size_bytes=len(frame), content_size_bytes=len(payload))
    manifest.size_bytes = len(frame)
    manifest.digest = digest_of(frame)
    return manifest


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"\0" * (64 << 20), "a frame names 67108864 bytes of content"), (None, "a zstd frame is corrupt")],
)
async def test_a_frame_that_inflates_to_something_else_is_refused_for_good(tmp_path, content, reason):
    """Its digest fits: nothing was lost on the way, so sending it again cannot help."""
    frame = b"no frame at all" if content is None else zstandard.compress(content)
    manifest = zstd_manifest(frame)
    async with two_devices(tmp_path) as (running, bad, task, good, good_task):
        with refused("INVALID_ARGUMENT", reason, "UpdateRefused"):
            await bad.send(pb.PushUpdateRequest(header=bad.header(task, manifest)), *chunks(frame))
        await finishes_without(running, good, good_task, reason)


def at_a_wrong_offset(payload):
    return [chunk(payload[:2048], 0), chunk(payload[2048:4096], 2049)]


def with_a_gap(payload):
    return [chunk(payload[:2048], 0), chunk(payload[4096:6144], 4096)]


def twice_the_same_chunk(payload):
    return [chunk(payload[:2048], 0), chunk(payload[:2048], 0)]


def with_a_bad_crc(payload):
    bad = chunk(payload[2048:4096], 2048)
    bad.chunk.crc32 ^= 1
    return [chunk(payload[:2048], 0), bad]


def past_the_declared_end(payload):
    return [chunk(payload[:2048], 0), chunk(payload[2048:] + b"more", 2048)]


def with_an_empty_chunk(payload):
    return [chunk(payload[:2048], 0), chunk(b"", 2048)]


def with_a_large_chunk(payload):
    return [chunk(payload[:2048], 0), chunk(payload[2048:7000], 2048)]


def with_nothing_in_a_message(payload):
    return [chunk(payload[:2048], 0), pb.PushUpdateRequest()]


@pytest.mark.parametrize(
    ("spoil", "code", "reason"),
    [
        (at_a_wrong_offset, "OUT_OF_RANGE", "the chunk starts at offset 2049, expected 2048"),
        (with_a_gap, "OUT_OF_RANGE", "the chunk starts at offset 4096, expected 2048"),
        (twice_the_same_chunk, "OUT_OF_RANGE", "the chunk starts at offset 0, expected 2048"),
        (with_a_bad_crc, "DATA_LOSS", "the chunk at offset 2048 does not match its CRC"),
        (past_the_declared_end, "RESOURCE_EXHAUSTED", "the chunk ends at byte 8172, declared: 8168"),
        (with_an_empty_chunk, "INVALID_ARGUMENT", "the chunk at offset 2048 is empty"),
        (with_a_large_chunk, "RESOURCE_EXHAUSTED", "a chunk of 4952 bytes; allowed are 4096"),
        (with_nothing_in_a_message, "INVALID_ARGUMENT", "come chunks, nothing else"),
    ],
)
async def test_a_bad_chunk_is_refused_and_what_came_before_it_is_kept(tmp_path, spoil, code, reason):
    manifest, payload = encoded(update_of(3.0))
    limit = 8192 if spoil is past_the_declared_end else 4096
    async with two_devices(tmp_path, max_chunk_bytes=limit) as (running, bad, task, good, good_task):
        header = pb.PushUpdateRequest(header=bad.header(task, manifest, example_count=30))
        with refused(code, reason):
            await bad.send(header, *spoil(payload))
        assert (await bad.held(task)).committed_size_bytes == 2048
        await finishes_with_both(running, bad, task, good, good_task)


async def test_a_message_larger_than_grpc_allows_costs_only_itself(tmp_path):
    manifest, payload = encoded(update_of(3.0))
    async with two_devices(tmp_path) as (running, bad, task, good, good_task):
        header = pb.PushUpdateRequest(header=bad.header(task, manifest, example_count=30))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await bad.send(header, chunk(payload[:2048], 0), chunk(b"x" * (9 << 20), 2048))
        assert caught.value.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED)
        await finishes_with_both(running, bad, task, good, good_task)


async def test_a_stream_that_is_cut_off_is_continued_where_it_stopped(tmp_path):
    manifest, payload = encoded(update_of(3.0))
    async with two_devices(tmp_path) as (running, bad, task, good, good_task):
        header = pb.PushUpdateRequest(header=bad.header(task, manifest, example_count=30))
        reply = await bad.send(header, *chunks(payload)[:3])
        assert (reply.committed_size_bytes, reply.complete) == (6144, False)
        assert (await bad.held(task)).committed_size_bytes == 6144
        await finishes_with_both(running, bad, task, good, good_task)


async def test_a_digest_that_does_not_match_starts_the_upload_over(tmp_path):
    manifest, payload = encoded(update_of(3.0))
    wrong = bytearray(payload)
    wrong[100] ^= 1
    async with two_devices(tmp_path) as (running, bad, task, good, good_task):
        header = pb.PushUpdateRequest(header=bad.header(task, manifest, example_count=30))
        with refused("DATA_LOSS", "does not match its digest", "CorruptError"):
            await bad.send(header, *chunks(bytes(wrong)))
        assert (await bad.held(task)).committed_size_bytes == 0
        await finishes_with_both(running, bad, task, good, good_task)


async def test_another_header_on_the_second_attempt_starts_the_upload_over(tmp_path):
    manifest, payload = encoded(update_of(9.0))
    async with two_devices(tmp_path) as (running, bad, task, good, good_task):
        header = pb.PushUpdateRequest(header=bad.header(task, manifest, example_count=30))
        await bad.send(header, *chunks(payload)[:3])
        other, payload = encoded(update_of(3.0))
        header = pb.PushUpdateRequest(header=bad.header(task, other, example_count=30))
        with refused("OUT_OF_RANGE", "the chunk starts at offset 6144, expected 0", "WrongOffset"):
            await bad.send(header, *chunks(payload, 6144))
        await finishes_with_both(running, bad, task, good, good_task)


async def test_an_update_sent_again_is_acknowledged_again_and_counts_once(tmp_path):
    async with two_devices(tmp_path) as (running, bad, task, good, good_task):
        for _ in range(3):
            assert (await bad.push(task, update_of(3.0), example_count=30)).complete
        assert (await bad.held(task)).complete
        await finishes_with_both(running, bad, task, good, good_task)
        assert (await bad.push(task, update_of(3.0), example_count=30)).complete
        assert (await bad.held(task)).complete


async def test_a_stream_without_a_header_is_refused(tmp_path):
    _, payload = encoded(update_of())
    async with two_devices(tmp_path) as (running, bad, task, good, good_task):
        for messages in (chunks(payload), [pb.PushUpdateRequest()], []):
            with refused("INVALID_ARGUMENT", "the first message of an update is its header", "LayoutError"):
                await bad.send(*messages)
        await finishes_with_both(running, bad, task, good, good_task)


async def test_a_second_header_is_refused(tmp_path):
    manifest, _ = encoded(update_of())
    async with two_devices(tmp_path) as (running, bad, task, good, good_task):
        header = pb.PushUpdateRequest(header=bad.header(task, manifest))
        with refused("INVALID_ARGUMENT", "come chunks, nothing else"):
            await bad.send(header, header)
        await finishes_with_both(running, bad, task, good, good_task)


async def test_the_size_of_an_accepted_update_is_told_also_after_its_round(tmp_path):
    manifest, payload = encoded(update_of(3.0))
    async with two_devices(tmp_path) as (running, bad, task, good, good_task):
        await bad.push(task, update_of(3.0))
        held = await bad.held(task)
        assert (held.committed_size_bytes, held.complete) == (manifest.size_bytes, True)
        await good.push(good_task)
        await running.until_ended(1)
        held = await bad.held(task)
        assert (held.committed_size_bytes, held.complete) == (len(payload), True)
