"""A run ends by itself once its versions do not get better, and keeps the best of them."""

from fedgrpc.rounds.version import Version
from fedgrpc.trainer import EvalResult
from fedgrpc.v1 import aggregator_pb2 as pb
from tests.support.hand_driven_device import MODEL
from tests.support.running_federation import ShiftTrainer, running_aggregator, start_worker


class Overfitting(ShiftTrainer):
    """Its third version is the best one."""

    def evaluate(self, weights):
        steps = float(weights["w"].mean() - MODEL["w"].mean())
        return EvalResult(10, {"accuracy": 0.9 - 0.1 * abs(steps - 2)})


async def test_patience_ends_the_run_and_a_more_patient_one_goes_on(tmp_path):
    about = {"rounds": 9, "policy": {"min_workers": 1}, "evaluate": True, "keep_versions": 1}
    async with running_aggregator(tmp_path, patience=2, **about) as running:
        worker = start_worker(running, tmp_path, "a", Overfitting())
        run = await running.until_finished()
        await worker
        assert "no version of the last 2 was better than version 3" in run.reason
        assert (run.best.version, run.last.version) == (3, 6)
        assert isinstance(running.aggregator.coordinator.machine.versions.get(3), Version)
        assert running.weights(3)["w"].shape == MODEL["w"].shape
    async with running_aggregator(tmp_path, patience=2, **about) as running:
        assert (await running.run()).phase == pb.RUN_PHASE_FINISHED
    async with running_aggregator(tmp_path, patience=4, **about) as running:
        worker = start_worker(running, tmp_path, "a", Overfitting())
        run = await running.until_finished()
        await worker
        assert run.last.version == 8
