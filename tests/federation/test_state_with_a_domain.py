"""Batch statistics, masks and tied weights through a whole federation: real aggregator, workers and files."""

import asyncio

import numpy as np
import pytest
import structlog

from fedgrpc.errors import TaskUnfit, UsageError
from fedgrpc.trainer import EvalResult, TrainResult
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import tensor_pb2
from fedgrpc.words import round_line
from tests.support.hand_driven_device import PATIENCE_S, chunks, encoded, refused
from tests.support.running_federation import ShiftTrainer, running_aggregator, start_worker

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file, save_model  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import TensorDataset  # noqa: E402

from fedgrpc.torch.task import TorchTask  # noqa: E402
from fedgrpc.trainer import TaskSetup  # noqa: E402

LOSSY = {"download_recipe": "int8+zstd", "upload_recipe": "entropy:c=5+zstd"}


class Columns(TorchTask):
    """BatchNorm over columns whose spreads differ by 10,000."""

    learning_rate = 0.05

    def __init__(self, site=0):
        self.site = site

    def model(self):
        return nn.Sequential(nn.BatchNorm1d(64), nn.Linear(64, 2))

    def data(self, path):
        draw = torch.Generator().manual_seed(self.site)
        inputs = torch.randn(200, 64, generator=draw) * torch.logspace(-2, 2, 64)
        return TensorDataset(inputs, (inputs[:, 0] > 0).long()), None


class Masked(TorchTask):
    """An attention mask of -inf, kept as a buffer, and an output tied to the embedding."""

    def model(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.tok = nn.Embedding(12, 8)
                self.register_buffer("mask", torch.triu(torch.full((4, 4), float("-inf")), diagonal=1))
                self.head = nn.Linear(8, 12, bias=False)
                self.head.weight = self.tok.weight

            def forward(self, tokens):
                hidden = self.tok(tokens)
                attention = (hidden @ hidden.transpose(1, 2) + self.mask).softmax(-1)
                return self.head((attention @ hidden)[:, -1])

        return Model()

    def data(self, path):
        tokens = torch.randint(0, 12, (40, 4), generator=torch.Generator().manual_seed(0))
        return TensorDataset(tokens, tokens[:, 0] % 3), None


async def ran(folder, *tasks, rounds=3, exit_codes=(0, 0), **settings):
    """The model files of a run from a worker's initial model, trained to its end by a worker for each task."""
    settings = {"rounds": rounds, "keep_versions": 9, "policy": {"min_workers": len(tasks)}, **LOSSY, **settings}
    folder.mkdir(exist_ok=True)
    async with running_aggregator(folder, **{"initial_model": None, **settings}) as running:
        crew = [
            start_worker(running, folder, f"pi-{number}", task.build_trainer(TaskSetup(options={})))
            for number, task in enumerate(tasks)
        ]
        await running.until_finished()
        assert await asyncio.wait_for(asyncio.gather(*crew), PATIENCE_S) == list(exit_codes[: len(crew)])
    return sorted((folder / "aggregator" / "models").glob("*.safetensors"))


class Site(Columns):
    def __init__(self):
        super().__init__(site=2)


@pytest.mark.parametrize("optimizer", ["fedavg", "fedavgm", "fedadam"])
async def test_statistics_of_the_inputs_are_the_same_whatever_the_encoding_and_the_server_optimizer(
    tmp_path, optimizer
):
    rate = 0.1 if optimizer == "fedadam" else None
    chosen = {"server_optimizer": optimizer, "server_learning_rate": rate}
    files = await ran(tmp_path, Columns, Site, rounds=6, **chosen)
    plain = await ran(tmp_path / "raw", Columns, Site, rounds=6, download_recipe="raw", upload_recipe="raw")
    assert len(files) == len(plain) == 7
    for path, raw in zip(files, plain, strict=True):
        found, wanted = load_file(path), load_file(raw)
        assert (found["0.running_var"] > 0).all()
        assert all(torch.equal(found[name], wanted[name]) for name in found if name.startswith("0.running"))
    assert load_file(files[-1])["0.num_batches_tracked"] == 6 * 7


async def test_a_mask_of_minus_infinity_and_tied_weights_train_and_load_plainly(tmp_path):
    files = await ran(tmp_path, Masked, Masked)
    model = Masked().model()
    mask = model.mask.clone()
    model.load_state_dict(load_file(files[-1]))
    assert torch.equal(model.mask, mask)
    assert len(files) == 4
    assert not torch.equal(load_file(files[0])["tok.weight"], load_file(files[-1])["tok.weight"])


@pytest.mark.parametrize("kept", ["save_model", "both names"])
async def test_an_initial_model_may_have_any_of_the_tied_names(tmp_path, kept):
    model = Masked().model()
    model.mask.zero_()
    if kept == "save_model":
        save_model(model, str(tmp_path / "tied.safetensors"))
    else:
        save_file({name: t.clone() for name, t in model.state_dict().items()}, tmp_path / "tied.safetensors")
    files = await ran(tmp_path, Masked, Masked, initial_model=tmp_path / "tied.safetensors")
    assert len(files) == 4
    model.load_state_dict(load_file(files[-1]))


async def test_an_initial_model_with_bools_of_other_bytes_is_taken_as_torch_takes_it(tmp_path):
    odd = torch.tensor([0, 255, 1, 2], dtype=torch.uint8).view(torch.bool)
    save_file({"w": torch.zeros(4), "m": odd}, tmp_path / "odd.safetensors")
    settings = {"initial_model": tmp_path / "odd.safetensors", "policy": {"min_workers": 1}}
    async with running_aggregator(tmp_path, **settings) as running:
        device = await running.device("a")
        task = await device.task()
        assert (await device.model(task))["m"].tolist() == [False, True, True, True]


async def test_an_update_whose_roles_are_others_is_refused(tmp_path):
    save_file({"w": torch.zeros(4), "bn.running_var": torch.ones(2)}, tmp_path / "initial.safetensors")
    async with running_aggregator(tmp_path, policy={"min_workers": 1}) as running:
        device = await running.device("a")
        task = await device.task()
        manifest, payload = encoded({"w": np.ones(4, np.float32), "bn.running_var": np.ones(2, np.float32)})
        manifest.entries[1].tensor.role = tensor_pb2.TENSOR_ROLE_PARAMETER
        with refused("INVALID_ARGUMENT", "'bn.running_var' is a parameter"):
            await device.send(pb.PushUpdateRequest(header=device.header(task, manifest)), *chunks(payload))


async def test_a_variance_below_zero_is_refused(tmp_path):
    save_file({"w": torch.zeros(4), "bn.running_var": torch.ones(2)}, tmp_path / "initial.safetensors")
    async with running_aggregator(tmp_path, policy={"min_workers": 1}) as running:
        device = await running.device("a")
        task = await device.task()
        tensors = {"w": np.ones(4, np.float32), "bn.running_var": np.array([1, -1e-30], np.float32)}
        with refused("INVALID_ARGUMENT", "'bn.running_var' is a variance"):
            await device.push(task, tensors)


async def test_a_worker_whose_model_is_not_the_runs_ends_at_once_and_says_why(tmp_path):
    class Wider(Columns):
        def model(self):
            return nn.Sequential(nn.BatchNorm1d(64), nn.Linear(64, 3))

    save_file(Columns().model().state_dict(), tmp_path / "initial.safetensors")
    async with running_aggregator(tmp_path, policy={"min_workers": 1}) as running:
        worker = start_worker(running, tmp_path, "pi", Wider.build_trainer(TaskSetup()))
        with pytest.raises(TaskUnfit, match=r"1\.weight"):
            await asyncio.wait_for(worker, PATIENCE_S)


async def test_weights_that_no_update_carries_end_the_worker_at_once(tmp_path):
    class Complex(ShiftTrainer):
        def initial_weights(self):
            return {"w": np.zeros(3, np.complex64)}

    async with running_aggregator(tmp_path, initial_model=None, policy={"min_workers": 1}) as running:
        with pytest.raises(TaskUnfit, match="complex64"):
            await asyncio.wait_for(start_worker(running, tmp_path, "pi", Complex()), PATIENCE_S)


async def test_a_trainer_tells_its_roles_and_a_constant_stays(tmp_path):
    table = {"w": np.zeros(100, np.float32), "table": np.full(100, np.inf, np.float32)}

    class Told(ShiftTrainer):
        def initial_weights(self):
            return table

        def roles(self):
            return {"table": "constant"}

        def train(self, weights, job):
            return TrainResult({"w": weights["w"] + 1, "table": np.zeros(100, np.float32)}, 10, 1)

        def evaluate(self, weights):
            return None

    settings = {"initial_model": None, "rounds": 2, "policy": {"min_workers": 1}}
    async with running_aggregator(tmp_path, **settings) as running:
        worker = start_worker(running, tmp_path, "pi", Told())
        await running.until_finished()
        assert await asyncio.wait_for(worker, PATIENCE_S) == 0
        assert np.array_equal(running.weights(3)["table"], table["table"])
        assert running.weights(3)["w"].tolist() == [2.0] * 100


def test_a_mask_in_an_initial_model_that_says_nothing_of_it_is_refused_with_the_cure(tmp_path):
    save_file({"mask": torch.full((4,), float("-inf"))}, tmp_path / "initial.safetensors")

    async def start():
        async with running_aggregator(tmp_path):
            pass

    with pytest.raises(UsageError, match=r"'mask'.*roles"):
        asyncio.run(start())


async def test_a_score_that_is_not_finite_is_told_where_the_operator_looks(tmp_path):
    class Diverged(ShiftTrainer):
        def evaluate(self, weights):
            return EvalResult(10, {"loss": float("nan"), "accuracy": 0.1})

    with structlog.testing.capture_logs() as events:
        async with running_aggregator(tmp_path, rounds=2, policy={"min_workers": 1}, evaluate=True) as running:
            worker = start_worker(running, tmp_path, "pi", Diverged())
            await running.until_finished()
            await asyncio.wait_for(worker, PATIENCE_S)
            record = await running.round(1)
    assert record.scores_not_finite == ["loss"]
    assert dict(record.metrics) == {"accuracy": 0.1}
    assert "loss" in round_line(record)
    told = [event for event in events if event["event"] == "scores not finite"]
    assert told
    assert all(tuple(event["names"]) == ("loss",) and event["log_level"] == "warning" for event in told)
