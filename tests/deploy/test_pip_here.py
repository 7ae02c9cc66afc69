"""What pip on this machine is told reaches pip inside of an image's build."""

from __future__ import annotations

from pathlib import Path

from tools.containers.pip_here import folders, settings

LISTED = """\
:env:.find-links='/opt/wheels'
global.cert='/etc/ssl/certs/ca-certificates.crt'
global.extra-index-url='file:///opt/pypi/simple https://packages.example/simple'
global.find-links='/else/where'
global.cache-dir='/root/.cache/pip'
list.format='columns'
"""


def test_a_variable_comes_before_a_file_and_what_is_of_no_use_stays_out() -> None:
    assert settings(LISTED) == {
        "find-links": "/opt/wheels",
        "cert": "/etc/ssl/certs/ca-certificates.crt",
        "extra-index-url": "file:///opt/pypi/simple https://packages.example/simple",
    }


def test_folders_that_are_here_are_named_with_what_an_index_refers_to(tmp_path: Path) -> None:
    (tmp_path / "index" / "simple").mkdir(parents=True)
    (tmp_path / "wheels").mkdir()
    found = {
        "find-links": f"{tmp_path}/wheels {tmp_path}/nowhere",
        "extra-index-url": f"file://{tmp_path}/index/simple https://packages.example/simple",
    }
    assert folders(found) == [f"{tmp_path}/index", f"{tmp_path}/wheels"]
