"""A version as an ONNX program gives the scores of the model that it was made of."""

import numpy as np
import pytest
import torch

from fedgrpc.errors import LayoutError, UsageError
from fedgrpc.storage.model_file import write_model
from fedgrpc.tasks.digits import Digits
from fedgrpc.torch.onnx_export import export_onnx
from fedgrpc.trainer import TaskSetup
from fedgrpc.worker.guarded_trainer import first_weights

pytestmark = pytest.mark.extras
TASK = "fedgrpc.tasks.digits"


@pytest.fixture
def weights(tmp_path):
    found, layout = first_weights(Digits.build_trainer(TaskSetup(seed=3)))
    write_model(tmp_path / "w.safetensors", layout, (found[spec.name] for spec in layout))
    return tmp_path / "w.safetensors"


def test_the_program_computes_what_the_model_does_for_any_batch(tmp_path, weights):
    onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
    from onnx.reference import ReferenceEvaluator

    path = tmp_path / "model.onnx"
    assert "batch" in export_onnx(weights, path, TASK, TaskSetup(), {"run": "cars"})
    program = onnx.load(path)
    assert {each.key: each.value for each in program.metadata_props}["run"] == "cars"
    module, example = Digits.build_trainer(TaskSetup(seed=3)).to_export(
        first_weights(Digits.build_trainer(TaskSetup(seed=3)))[0]
    )
    inputs = torch.rand(5, *example.shape[1:])
    (found,) = ReferenceEvaluator(program).run(None, {"input": inputs.numpy()})
    assert np.allclose(found, module(inputs).detach().numpy(), atol=1e-5)


def test_weights_of_another_model_and_tasks_without_pytorch_are_refused(tmp_path, weights):
    pytest.importorskip("onnx", reason="needs the extra onnx")
    with pytest.raises(LayoutError, match="not those"):
        export_onnx(weights, tmp_path / "x.onnx", "fedgrpc.tasks.fashion_mnist", TaskSetup())
    with pytest.raises(UsageError, match="no TorchTask"):
        export_onnx(weights, tmp_path / "x.onnx", "tests.support.learning_tasks:Recorded", TaskSetup())
