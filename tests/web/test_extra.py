"""The packages of the page."""

import subprocess
import sys

import pytest

from tests.web.conftest import MISSING


def test_the_page_has_its_packages():
    if MISSING:
        pytest.skip(f"the page needs {', '.join(MISSING)} of fedgrpc[web]: make test-extras")


def test_an_aggregator_without_a_page_imports_nothing_of_it():
    names = ("starlette", "uvicorn", "jinja2")
    code = f"import sys, fedgrpc.cli.aggregator; print([name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
