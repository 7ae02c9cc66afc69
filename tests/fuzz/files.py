"""Readers of files, each given a damaged one: disks rot, downloads break off, people name the wrong file."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import tempfile
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Final

import numpy as np
from safetensors.numpy import save

from fedgrpc.cli.simulate import read_fleet
from fedgrpc.cli.values import read_table
from fedgrpc.codec.chunk import Chunk, crc32
from fedgrpc.codec.feedback import Residual
from fedgrpc.codec.layout import layout_of
from fedgrpc.codec.values import part_of
from fedgrpc.datasets.cifar10 import load_cifar10
from fedgrpc.datasets.dataset import Examples, LabelledData
from fedgrpc.datasets.fashion_mnist import read_idx
from fedgrpc.datasets.shares import load_share, save_share
from fedgrpc.errors import UsageError
from fedgrpc.hierarchy.partial_aggregate import AggregateFile
from fedgrpc.protocol.tensors import manifest_to_proto
from fedgrpc.rounds.events import LossCause, TaskPhase
from fedgrpc.rounds.history import Timing, WorkerHistory
from fedgrpc.runs.events import EndReason, RunPhase
from fedgrpc.simulation.fleet import DescribedFleet
from fedgrpc.storage.model_file import ModelFile, ModelTensors, write_model
from fedgrpc.storage.residual_file import read_residual, write_residual
from fedgrpc.storage.run_store import RunStore
from fedgrpc.storage.task_rows import RunRow, TaskRow
from fedgrpc.storage.uploads import UploadJournal
from fedgrpc.submodels.plan import LocalModelPlan
from fedgrpc.submodels.plan_table import PlanTable
from fedgrpc.v1 import aggregator_pb2, round_pb2
from fedgrpc.worker.held_model import Source
from fedgrpc.worker.model_folder import ModelFolder
from fedgrpc.worker.spool import Spool
from tests.fuzz.messages import PLAN_TEXTS, TABLE_TEXTS
from tests.fuzz.mutate import made, mutated, spoiled_document
from tests.fuzz.payloads import LAYOUT, MODEL, encoded
from tests.fuzz.registry import target

_RUN: Final = "run"
_OTHERS: Final = (
    b"",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    b"<!DOCTYPE html>\n<html><title>404 Not Found</title></html>",
    b"PK\x03\x04 a file of pytorch, or any archive",
    b"\x80\x02}q\x00.",
    b"\xff" * 64,
)


def _put(path: Path, good: bytes, rnd: Random) -> Path:
    """A damaged copy of a file, or another kind of file under its name."""
    path.write_bytes(rnd.choice(_OTHERS) if rnd.random() < 0.03 else mutated(good, rnd))
    return path


def _named(path: Path, read: Callable[[], object]) -> None:
    """Whoever gives a file is told which one cannot be used, in one line."""
    try:
        read()
    except UsageError as error:
        _check_line(str(error), path.name)
        raise


def _check_line(text: str, name: str) -> None:
    assert name in text, text
    assert "\n" not in text, text


@cache
def _safetensors() -> tuple[bytes, ...]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.safetensors"
        write_model(path, LAYOUT, MODEL.values())
        own = path.read_bytes()
    return own, save(MODEL), save({"a": np.ones(3, np.float16), "b": np.ones(2, np.int8)}, {"note": "x" * 40})


@target(share=20)
def model_files(rnd: Random, folder: Path) -> None:
    path = _put(folder / "m.safetensors", rnd.choice(_safetensors()), rnd)

    def read() -> None:
        model = ModelFile.open(path)
        tensors = ModelTensors(model)
        for index, spec in enumerate(model.layout):
            array = model.tensor(index)
            assert (array.shape, array.dtype) == (spec.shape, spec.numpy_dtype)
            assert part_of(tensors, spec.name)(0, spec.size).tobytes() == array.tobytes()
        _ = model.as_written, model.sha256()

    _named(path, read)


@cache
def _share() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.npz"
        inputs = np.arange(200, dtype=np.uint8).reshape(10, 20)
        save_share(path, LabelledData(Examples(inputs, np.arange(10)), Examples(inputs[:3], np.arange(3))))
        return path.read_bytes()


@target(share=10)
def shares(rnd: Random, folder: Path) -> None:
    path = _put(folder / "s.npz", _share(), rnd)
    _named(path, lambda: load_share(path))


@cache
def _idx() -> bytes:
    return b"\0\0\x08\x02" + (4).to_bytes(4, "big") + (5).to_bytes(4, "big") + bytes(range(20))


@target(share=10)
def idx_files(rnd: Random, folder: Path) -> None:
    zipped = rnd.random() < 0.5
    path = folder / ("i.gz" if zipped else "i")
    _put(path, gzip.compress(_idx(), mtime=0) if zipped else _idx(), rnd)
    _named(path, lambda: read_idx(path))


@cache
def _cifar(kind: str) -> tuple[tuple[str, bytes], ...]:
    pixels = np.zeros((2, 3072), np.uint8)
    if kind == "binary":
        content = (np.array([[3], [4]], np.uint8), pixels)
        data = np.concatenate(content, axis=1).tobytes()
        return ("data_batch_1.bin", data), ("test_batch.bin", data)
    data = pickle.dumps({b"data": pixels, b"labels": [3, 4]}, protocol=2)
    return ("data_batch_1", data), ("test_batch", data)


@target(share=4)
def cifar_archives(rnd: Random, folder: Path) -> None:
    """Damage within the archive, where gzip's own checksum does not see it, or to the archive."""
    inside = rnd.random() < 0.8
    path = folder / "cifar.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, data in _cifar(rnd.choice(("binary", "python"))):
            content = mutated(data, rnd) if inside else data
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    if not inside:
        _put(path, path.read_bytes(), rnd)
    _named(path, lambda: load_cifar10(path))


@cache
def _residual() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "r"
        tensors = {name: array for name, array in MODEL.items() if array.dtype == np.float32}
        write_residual(path, Residual(layout_of(tensors), tensors), _RUN)
        return path.read_bytes()


@target(share=15)
def residuals(rnd: Random, folder: Path) -> None:
    path = _put(folder / "r", _residual(), rnd)
    tensors = read_residual(path, _RUN).tensors
    for name in tensors:
        array = tensors[name]
        assert part_of(tensors, name)(0, array.size).tobytes() == array.tobytes()


def _header(token: str = "token") -> tuple[aggregator_pb2.UpdateHeader, bytes]:
    manifest, payload = encoded({"w": MODEL["w"]}, "int8")
    header = aggregator_pb2.UpdateHeader(worker="pi-1", token=token, example_count=5)
    header.manifest.CopyFrom(manifest_to_proto(manifest))
    return header, payload


@cache
def _spooled() -> bytes:
    header, payload = _header()

    def fill(out: Any, keep: Any) -> tuple[aggregator_pb2.UpdateHeader, None]:
        out.write(payload)
        return header, None

    with tempfile.TemporaryDirectory() as folder:
        update = Spool(Path(folder)).write(aggregator_pb2.Task(token="token", run=_RUN, round=3, kind=1), fill)
        return (update.folder / "payload").read_bytes()


@target(share=6)
def spools(rnd: Random, folder: Path) -> None:
    update = folder / "spool" / "00000001"
    update.mkdir(parents=True, exist_ok=True)
    _put(update / "payload", _spooled(), rnd)
    for spooled in Spool(folder / "spool").updates():
        with spooled.reader() as read:
            assert len(read(0, spooled.size_bytes)) == spooled.size_bytes


@cache
def _held() -> dict[str, bytes]:
    manifest, payload = encoded(dict(MODEL), "raw")
    header = aggregator_pb2.ModelHeader(version=3, manifest=manifest_to_proto(manifest))
    with tempfile.TemporaryDirectory() as folder:
        models = ModelFolder(Path(folder))
        partial = models.open_partial(Source(_RUN, 3), header, 0)
        assert partial is not None
        partial.append([Chunk(0, payload, crc32(payload))])
        held = models.finish(partial)
        return {path.name: path.read_bytes() for path in held.folder.iterdir()}


@target(share=6)
def held_models(rnd: Random, folder: Path) -> None:
    held = folder / "model" / "00000001"
    held.mkdir(parents=True, exist_ok=True)
    damaged = rnd.choice(sorted(_held()))
    for name, good in _held().items():
        (held / name).write_bytes(mutated(good, rnd) if name == damaged else good)
    model = ModelFolder(folder / "model").held
    if model is not None:
        for array in model.weights().values():
            assert array.flags.writeable


@cache
def _journal(complete: bool) -> bytes:
    header, payload = _header()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        journal = UploadJournal(folder)
        upload = journal.begin(header, encoded({"w": MODEL["w"]}, "int8")[0])
        upload.append([Chunk(0, payload, crc32(payload))])
        if not complete:
            upload.close()
            return (folder / "token.part").read_bytes()
        return upload.finish() and upload.seal().path.read_bytes()


@target(share=10)
def journals(rnd: Random, folder: Path) -> None:
    journal = UploadJournal(folder / "journal") if (folder / "journal").exists() else _empty_journal(folder)
    if rnd.random() < 0.5:
        _put(folder / "journal" / "token.part", _journal(complete=False), rnd)
        held = journal.committed_bytes("token")
        header, _ = _header()
        upload = journal.begin(header, encoded({"w": MODEL["w"]}, "int8")[0])
        assert 0 <= upload.size_bytes <= header.manifest.size_bytes
        assert held >= 0
        upload.discard()
        return
    _put(folder / "journal" / "token.update", _journal(complete=True), rnd)
    update = journal.load("token")
    assert update is not None
    with update.open() as reader:
        for name in reader.names:
            reader.tensor(name)


def _empty_journal(folder: Path) -> UploadJournal:
    (folder / "journal").mkdir()
    return UploadJournal(folder / "journal")


_SETTINGS: Final = (
    b'[aggregator]\nrounds = 5\nweight = {a = 0.5, b = 1}\nencoding = "int8+zstd"\nmin-workers = 2\n'
)
_KEYS: Final = {"rounds": False, "weight": True, "encoding": False, "min_workers": False}
_DEEP: Final = (
    b"x = " + b"[" * 6000,
    b"x = " + b"9" * 6000,
    b"a" + b".a" * 4000 + b" = 1",
    b"x = " + b"{a = " * 3000,
)


@target(share=8)
def settings_files(rnd: Random, folder: Path) -> None:
    good = rnd.choice((_SETTINGS, _SETTINGS, b"[aggregator]\n" + rnd.choice(_DEEP)))
    path = _put(folder / "fedgrpc.toml", good, rnd)
    _named(path, lambda: read_table(path, "aggregator", _KEYS))


@target(share=8)
def plan_files(rnd: Random, folder: Path) -> None:
    good = rnd.choice((*PLAN_TEXTS, *TABLE_TEXTS, rnd.choice(_DEEP).decode()))
    text = mutated(good.encode(), rnd).decode("utf-8", "replace")
    rnd.choice((LocalModelPlan.from_toml, PlanTable.from_toml))(text)


_FLEET: Final = (Path(__file__).parents[2] / "examples" / "fleet.toml").read_bytes()


@target(share=8)
def fleets(rnd: Random, folder: Path) -> None:
    path = _put(folder / "fleet.toml", _FLEET if rnd.random() < 0.9 else rnd.choice(_DEEP), rnd)
    _named(path, lambda: read_fleet(path))


@target(share=8)
def documents(rnd: Random, folder: Path) -> None:
    """TOML that is TOML, with values that nobody means."""
    if rnd.random() < 0.5:
        read, text = DescribedFleet.parse, _FLEET.decode()
    else:
        read, text = LocalModelPlan.from_mapping, rnd.choice(PLAN_TEXTS)
    document = made(spoiled_document(tomllib.loads(text), rnd), rnd)
    # The root of TOML is a table.
    read(document if isinstance(document, dict) else {"rules": document, "width": document})


@target(share=5)
def kept_means(rnd: Random, folder: Path) -> None:
    """What an aggregator below another keeps of its answer."""
    means = AggregateFile(folder / "means")
    header, payload = _header()
    (folder / "means" / "mean.payload").write_bytes(payload)
    _put(folder / "means" / "mean.header", header.SerializeToString(), rnd)
    stored = means.load("token")
    assert stored is None or stored.header.token == "token"


@cache
def _database() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.sqlite"
        store = RunStore(path)
        store.save_run(RunRow("id", _RUN, RunPhase.RUNNING, EndReason.NONE, "", 0.0))
        store.save_worker(aggregator_pb2.RegisterRequest(worker="pi-1", role=1, encodings=["int8"]), "a.b")
        record = round_pb2.Round(number=3, phase=2, base_version=2, kind=1)
        record.tasks.add(worker="pi-1", example_count=5, metrics={"loss": 0.5})
        tasks = [TaskRow(f"token{slot}", 3, slot, "pi-1", TaskPhase.TRAINING, "why") for slot in range(3)]
        history = WorkerHistory(
            timings=(Timing(1.0, 2.0, None, cut=True),), loss=0.25, endings=(LossCause.NONE, LossCause.SLOW_UPLOAD)
        )
        store.save_open_round(record, 2, 9.0, tasks, {"pi-1": history})
        store.close()
        return path.read_bytes()


@cache
def _written(data: bytes) -> tuple[int, ...]:
    return tuple(place for place, byte in enumerate(data) if byte)


@target(share=6)
def databases(rnd: Random, folder: Path) -> None:
    """Damage to rows rather than to empty pages: only what is not zero is of use."""
    path = folder / "run.sqlite"
    data = bytearray(_database())
    for _ in range(rnd.choice((1, 1, 2, 5))):
        data[rnd.choice(_written(_database()))] = rnd.randrange(256)
    path.write_bytes(made(bytes(data), rnd))
    store = RunStore(path, read_only=True)
    try:
        run, workers, opened = store.run(), list(store.workers()), store.open_round()
        _ = run, workers, opened, store.sessions(), store.task("token1"), store.round(3), store.rounds(9, 5)
    finally:
        store.close()
