"""The page needs the packages of an extra: without them its tests are left out, and `test_extra.py` says why."""

from importlib.util import find_spec

import pytest

NEEDED = ("starlette", "uvicorn", "jinja2", "httpx")
MISSING = [name for name in NEEDED if find_spec(name) is None]
collect_ignore_glob = ["test_[!e]*.py"] if MISSING else []


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/web/" in str(item.path):
            item.add_marker(pytest.mark.extras)
