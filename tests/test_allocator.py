import os
import platform
import subprocess
import sys

import pytest

ASK = "from fedgrpc.process import reuse_memory; print(reuse_memory())"


def answer(**environment):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", ASK]
    return subprocess.run(command, env={**kept, **environment}, check=True, capture_output=True, text=True).stdout


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's memory that is set up")
def test_memory_is_set_up_where_glibc_hands_it_out():
    assert answer() == "True\n"


def test_what_the_user_has_set_up_stays():
    assert answer(MALLOC_ARENA_MAX="4") == "False\n"
    assert answer(GLIBC_TUNABLES="glibc.malloc.arena_max=4") == "False\n"
