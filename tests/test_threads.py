"""A run on a shared machine neither spins nor starts more threads than it has cores."""

import os
import platform
import subprocess
import sys

import pytest

from harness.config import ROOT
from harness.threads import usable_cores

ASK = """
import os, sys
sys.path.insert(0, '.')
import harness
print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)
"""


def asked(**environment):
    kept = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", ASK], cwd=ROOT, env=kept | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_threads_wait_asleep_before_torch_is_loaded_unless_the_user_chose_otherwise():
    assert asked() == ["PASSIVE", "False"]
    assert asked(OMP_WAIT_POLICY="ACTIVE") == ["ACTIVE", "False"]


def test_a_containers_share_of_the_cores_counts(tmp_path):
    quota = tmp_path / "cpu.max"
    own = len(os.sched_getaffinity(0))
    for text, cores in (("max 100000", own), ("150000 100000", min(own, 2)), ("20000 100000", 1), ("nonsense", own)):
        quota.write_text(text)
        assert usable_cores(quota) == cores
    assert usable_cores(tmp_path / "none") == own


ARENAS = """
import ctypes, sys, threading
sys.path.insert(0, '.')
from harness.threads import share_arenas
if 'shared' in sys.argv:
    share_arenas()
libc, together = ctypes.CDLL(None), threading.Barrier(8)
def hold():
    libc.malloc(1000)
    together.wait()
threads = [threading.Thread(target=hold) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
libc.malloc_stats()
"""


def arenas(*words, **environment):
    command = [sys.executable, "-c", ARENAS, *words]
    kept = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    done = subprocess.run(command, cwd=ROOT, env=kept | environment, capture_output=True, text=True, check=True)
    return done.stderr.count("Arena ")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="arenas are glibc's")
def test_threads_of_a_game_share_two_arenas_unless_the_user_chose_otherwise():
    assert arenas() > 2
    assert arenas("shared") == 2
    assert arenas("shared", MALLOC_ARENA_MAX="3") == 3
