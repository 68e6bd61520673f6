"""Every Triton kernel compiles for sm_90, which the interpreter says nothing about; needs no GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("the package triton is not installed", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
LAUNCHED = {
    "residual_norm": {"residual_norm_kernel"},
    "prefill": {"heads_kernel", "prefill_kernel"},
    "linears": {"gemm_bf16", "gemm_fp8", "quantise_rows"},
}
"""By case of ``triton_for_hopper.py``; of ``window_kernel`` there is a test in tests/rollout/test_rollout_fused.py."""


def compiled(case: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("triton_for_hopper.py")
    return subprocess.run(
        [sys.executable, str(script), case],
        env=inherited | {"PYTHONPATH": os.pathsep.join([str(ROOT), inherited.get("PYTHONPATH", "")])} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("case", LAUNCHED)
def test_what_is_launched_compiles_for_hopper(case):
    done = compiled(case)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()[1:]) == LAUNCHED[case]


def test_no_kernel_is_forgotten():
    """Kernels are what a host function launches: functions of ``harness/kernels/triton`` that end in ``_kernel``, and
    those of ``gemm.py`` that ``ops.py`` launches."""
    folder = ROOT / "harness" / "kernels" / "triton"
    lines = [line for path in folder.glob("*.py") for line in path.read_text().splitlines()]
    names = {line.removeprefix("def ").split("(")[0] for line in lines if line.startswith("def ")}
    assert {name for name in names if name.endswith("_kernel")} | LAUNCHED["linears"] == (
        set().union(*LAUNCHED.values()) | {"window_kernel"}
    )
