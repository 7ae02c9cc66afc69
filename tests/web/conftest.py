"""The page needs the packages of an extra: without them its tests skip."""

import pytest

for name in ("starlette", "uvicorn", "jinja2", "httpx"):
    pytest.importorskip(name, reason="the page needs the packages of fedgrpc[web]: make test-extras")


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/web/" in str(item.path):
            item.add_marker(pytest.mark.extras)
