"""What ``pip install .`` brings: configs, page templates and CUDA sources, working in any folder."""

import shutil
import subprocess
import sys
import zipfile

import pytest

from harness.config import ROOT

CARRIED = (
    "conf/**/*.yaml",
    "harness/**/*.cu",
    "harness/**/*.cuh",
    "harness/**/*.json",
    "harness/**/templates/*",
    "harness/live/page/*",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("conf", "harness"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    if "Cannot import 'setuptools" in done.stderr:
        pytest.skip("setuptools is not installed here")
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_every_file_that_the_product_reads_travels(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        str(path.relative_to(ROOT)).replace("conf/", "harness/conf/", 1)
        if pattern.startswith("conf")
        else str(path.relative_to(ROOT))
        for pattern in CARRIED
        for path in ROOT.glob(pattern)
        if path.is_file()
    }
    assert len(wanted) > 90
    assert wanted - names == set()
    assert {name for name in names if name.startswith(("conf/", "tests/", "scripts/"))} == set()


@pytest.mark.slow
def test_an_installed_wheel_runs_in_an_empty_folder(wheel, tmp_path):
    site, there = tmp_path / "site", tmp_path / "there"
    zipfile.ZipFile(wheel).extractall(site)
    there.mkdir()
    words = ["model=smoke", "model.arch.n_layers=2", "data.limit=1", "data.future_frames=2", "quant=mxfp8_mlp"]
    words += ["measure.videos=false", "measure.parts_frames=0", "hydra.run.dir=out"]
    own = [f"model.{name}={there}" for name in ("config_file", "checkpoint")]
    own += [f"decoder.{name}={there}" for name in ("config_file", "checkpoint")] + [f"data.paths=[{there}]"]
    for module, more in (("harness", words), ("harness.run", ["quant=mxfp8_mlp"]), ("harness.run", own)):
        done = subprocess.run(
            [sys.executable, "-m", module, *more],
            cwd=there,
            env={"PYTHONPATH": str(site), "PATH": ""},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        if module == "harness":
            assert done.returncode == 0, done.stderr
            assert (there / "out" / "report.html").is_file()
            told = done.stdout + (there / "out" / "record.json").read_text(encoding="utf-8")
            assert "mx-world run" in told  # the next command, as it can be typed here
            assert "python harness/run.py" not in told
        else:
            assert done.returncode == 2
            assert done.stderr.startswith("error: the demo model is not part of the installed package")
            assert "decoder.encoder (null: decoder.checkpoint has it)" in done.stderr
            assert ("model.checkpoint" in done.stderr) == (more is not own), "what was given is not asked for again"
