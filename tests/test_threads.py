"""A worker's threads leave cores to other processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def said(code, **more):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment | more, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize(("chosen", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "active"}, "active")])
def test_idle_threads_sleep_unless_the_user_has_chosen_before_a_task_brings_torch(chosen, policy):
    code = (
        "import os, sys; from fedgrpc.worker.task_loader import find_task; assert 'torch' not in sys.modules;"
        "find_task('tests.support.learning_tasks:Recorded'); print(os.environ['OMP_WAIT_POLICY'])"
    )
    assert said(code, **chosen) == [policy]


def test_threads_are_those_of_torch_and_of_what_is_loaded_before():
    pytest.importorskip("torch")
    pytest.importorskip("threadpoolctl")
    code = (
        "import numpy; from fedgrpc.process import use_threads; use_threads(1); import torch;"
        "from threadpoolctl import threadpool_info;"
        "print(torch.get_num_threads(), *(each['num_threads'] for each in threadpool_info()))"
    )
    assert set(said(code)) == {"1"}
