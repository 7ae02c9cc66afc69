"""What all tests share."""

import sys

import pytest

from fedgrpc.logging import configure


@pytest.fixture(scope="session", autouse=True)
def readable_logs():
    """Plain tracebacks: structlog's own default prints every local variable, for seconds."""
    configure(level="warning", log_format="console", stream=sys.__stderr__)
