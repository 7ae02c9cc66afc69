"""What the tests in real pods share: a network of this machine's own, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.deploy.pods import PREFIX
from tools.containers.network import Network, NetworkError
from tools.containers.podman import AGGREGATOR_IMAGE, WORKER_IMAGE, why_not


@pytest.fixture
def network() -> Iterator[Network]:
    reason = why_not(AGGREGATOR_IMAGE, WORKER_IMAGE)
    if reason is not None:
        pytest.skip(reason)
    try:
        with Network(PREFIX) as made:
            yield made
    except NetworkError as error:
        pytest.skip(f"no network of its own: {error}")
