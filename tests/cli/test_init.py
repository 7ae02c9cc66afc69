"""`fedgrpc init`: a first model written on a workstation."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from fedgrpc.codec.layout import TensorRole
from fedgrpc.storage.model_file import ModelFile
from tests.support.command_line import NUMPY_TASK, aggregator_command, fedgrpc


def test_init_writes_the_untrained_model_of_a_task_that_an_aggregator_starts_from(tmp_path: Path) -> None:
    path = tmp_path / "first.safetensors"
    done = fedgrpc("init", "--task", NUMPY_TASK, "--to", str(path))
    assert (done.code, done.error) == (0, "")
    assert str(path) in done.out
    with safe_open(path, "numpy") as file:
        assert file.metadata()["task"] == NUMPY_TASK
        names = set(file.keys())
    again = fedgrpc("init", "--task", NUMPY_TASK, "--to", str(path))
    assert (again.code, "exists" in again.error) == (2, True)
    with aggregator_command(tmp_path, "--initial-model", str(path)) as (_, address):
        status = fedgrpc("status", "--aggregator", address, "--json")
        assert status.code == 0, status.error
        assert all(f'"{name}"' in status.out for name in names)
        refused = fedgrpc("rollback", "7", "--aggregator", address)
        assert (refused.code, "kept are 1" in refused.error) == (1, True)
        back = fedgrpc("rollback", "1", "--aggregator", address, "--reason", "to see")
        assert (back.code, "model version 2" in back.out) == (0, True), back.error


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--to", "x.safetensors"), "--task"),
        (("--task", NUMPY_TASK), "--to"),
        (("--task", NUMPY_TASK, "--to", "nowhere/x.safetensors"), "nowhere"),
        (("--task", "no_such_module", "--to", "x.safetensors"), "no_such_module"),
    ],
)
def test_what_cannot_be_written_is_told_in_one_line(
    tmp_path: Path, arguments: tuple[str, ...], reason: str
) -> None:
    done = fedgrpc("init", *arguments, cwd=tmp_path)
    assert (done.code, reason in done.error, done.error.count("\n")) == (2, True, 1)


def test_masks_and_tied_weights_are_in_the_file_with_their_roles_and_names(tmp_path: Path) -> None:
    path = tmp_path / "first.safetensors"
    task = "tests.federation.test_state_with_a_domain:Masked"
    done = fedgrpc("init", "--task", task, "--to", str(path))
    assert done.code == 0, done.error
    layout = {spec.name: spec for spec in ModelFile.open(path).layout}
    assert layout["mask"].role is TensorRole.STATISTIC
    assert layout["head.weight"].tied_names == ("tok.weight",)
