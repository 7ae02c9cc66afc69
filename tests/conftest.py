"""What all tests share."""

import random
import signal
import sys

import hypothesis
import numpy as np
import pytest

from fedgrpc.logging import configure

# Programs started in the background of a script ignore SIGINT, and their children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# An example may take as long as a loaded machine needs, and a change is judged by the same examples as the one
# before it. `make test ARGS="--hypothesis-profile=searching"` looks for others.
_patient = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("searching", **_patient)
hypothesis.settings.register_profile("patient", **_patient, derandomize=True)
hypothesis.settings.load_profile("patient")


@pytest.fixture(autouse=True)
def same_chance():
    """What draws from a global generator draws the same, whichever tests came before."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def readable_logs():
    """Plain tracebacks: structlog's own default prints every local variable, for seconds."""
    configure(level="warning", log_format="console", stream=sys.__stderr__)
