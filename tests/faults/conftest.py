"""The table of recovery times that `make faults` prints at its end."""

import pytest

_measured = []


@pytest.fixture
def recovery_of():
    """Call it with what was broken, and the seconds until it was whole again."""
    return lambda fault, seconds: _measured.append((fault, seconds))


def pytest_terminal_summary(terminalreporter):
    if _measured and terminalreporter.config.option.verbose >= 0:
        terminalreporter.section("recovery times")
        for fault, seconds in _measured:
            terminalreporter.write_line(f"{seconds:7.2f} s  {fault}")
