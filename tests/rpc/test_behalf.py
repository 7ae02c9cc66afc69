"""Calls that the page makes for somebody whose certificate it has seen."""

import pytest

from fedgrpc.rpc.behalf import BehalfChannel
from tests.support.echo_service import SHAPES


@pytest.mark.parametrize("shape", SHAPES)
def test_a_channel_for_somebody_else_makes_calls_of_every_shape(shape):
    """Generated stubs make all of theirs at once: one that is missing fails them all."""
    assert callable(getattr(BehalfChannel, shape))
