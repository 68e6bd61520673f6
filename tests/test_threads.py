"""A run on a shared machine neither spins nor starts more threads than it has cores."""

import os
import subprocess
import sys

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
