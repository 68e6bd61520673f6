"""What a command imports, and what it leaves alone."""

import os
import subprocess
import sys

import pytest

from harness.config import ROOT
from harness.imports import UNNEEDED

HERE = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def beside(tmp_path):
    """A folder of packages that torchmetrics would import, and which break when they are."""
    for name in UNNEEDED:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise RuntimeError('{name} was imported')\n")
        (tmp_path / f"{name}-99.0.dist-info").mkdir()
        (tmp_path / f"{name}-99.0.dist-info/METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 99.0\n"
        )
    return tmp_path


def started(folder, *command):
    env = {**HERE, "PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, cwd=ROOT, timeout=300)


def test_the_packages_beside_would_be_imported_otherwise(beside):
    assert "was imported" in started(beside, "-c", "import torchmetrics").stderr


@pytest.mark.parametrize("command", [("harness/run.py",), ("-m", "harness.play")])
def test_a_command_imports_nothing_that_torchmetrics_has_for_others(beside, command):
    done = started(beside, *command, "model.checkpoint=nowhere.pt")  # which is found wrong once all is imported
    assert done.returncode == 2, done.stderr
    assert "model.checkpoint=nowhere.pt: no such file" in done.stderr
    assert "was imported" not in done.stderr


def test_what_was_hidden_can_be_imported_afterwards(beside):
    (beside / "matplotlib/__init__.py").write_text("here = True\n")
    code = (
        "from harness.imports import import_torchmetrics; import_torchmetrics(); import matplotlib, torchmetrics;"
        "from importlib.metadata import version; print(matplotlib.here, version('scipy'))"
    )
    assert started(beside, "-c", code).stdout.split() == ["True", "99.0"]


def test_torchs_compiler_is_imported_once_something_is_compiled(tmp_path):
    """Where nothing is, a run ends without it; and Lightning still knows a compiled module by its class."""
    words = ["model=smoke", "model.arch.n_layers=1", "quant=mxfp4_mlp", "kv=mx_kv", "data.limit=1"]
    words += ["data.future_frames=1", "measure.videos=false", f"hydra.run.dir={tmp_path / 'run'}"]
    code = (
        "import sys; from harness.run import cli; cli();"
        "print('compiler', 'torch._dynamo' in sys.modules);"
        "import torch; from lightning.fabric.wrappers import _unwrap_compiled;"
        "linear = torch.nn.Linear(1, 1); compiled = torch.compile(linear, backend='eager');"
        "print(_unwrap_compiled(linear)[0] is linear, _unwrap_compiled(compiled)[0] is linear)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, env=HERE, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["compiler False", "True True"]
    assert (tmp_path / "run/record.json").exists()
