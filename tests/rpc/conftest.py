"""Certificates for the tests of channels and servers."""

import pytest

from tests.support.certificates import make_authority, make_certificate


@pytest.fixture
def pki(tmp_path):
    make_authority(tmp_path)
    for name in ("server", "client"):
        make_certificate(tmp_path, name)
    return tmp_path
