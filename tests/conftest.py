"""What all tests share."""

import signal
import sys

import hypothesis
import pytest

from fedgrpc.logging import configure

# Programs started in the background of a script ignore SIGINT, and their children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# An example may take as long as a loaded machine needs.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


@pytest.fixture(scope="session", autouse=True)
def readable_logs():
    """Plain tracebacks: structlog's own default prints every local variable, for seconds."""
    configure(level="warning", log_format="console", stream=sys.__stderr__)
