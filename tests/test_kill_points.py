"""Points at which the fault tests kill a process are named as text: each must be a function that there is."""

import functools
import importlib

import pytest

from tests.faults.points import AGGREGATOR, CARRYING, PRIVATE, SECURE, SECURE_LEAF, WORKER

POINTS = {**AGGREGATOR, **CARRYING, **PRIVATE, **SECURE, **SECURE_LEAF, **WORKER}


@pytest.mark.parametrize("name", POINTS)
def test_every_kill_point_is_a_function_that_exists(name):
    point = POINTS[name]
    for target in filter(None, (point.target, point.sigterm_at)):
        module, _, path = target.partition(":")
        assert callable(functools.reduce(getattr, path.split("."), importlib.import_module(module)))
