"""Sweeps through each launcher, as a user starts them, on this machine."""

import importlib.metadata
import subprocess
import sys

import pytest

from harness.config import ROOT, extras
from harness.config.compose import load
from harness.config.extras import missing_launcher, missing_logger
from harness.report.record import load_record
from harness.run import cli

QUICK = ["model=smoke", "model.arch.n_layers=2", "data.limit=1", "data.future_frames=2", "measure.videos=false"]
QUICK += ["measure.parts_frames=0"]


def needs(launcher):
    problem = missing_launcher([f"sweep={launcher}"])
    if problem is not None:
        pytest.skip(problem)


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local", pytest.param("ray", marks=pytest.mark.slow)])
def test_a_sweep_runs_its_grid_and_writes_one_page(tmp_path, launcher):
    needs(launcher)
    words = [f"sweep={launcher}", *QUICK, "quant=mxfp8_mlp,mxfp4_mlp", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    command = [sys.executable, str(ROOT / "harness" / "run.py"), "-m", *words]
    # From the repository: submitit's and Ray's workers find the harness there, unless it is installed.
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    records = [load_record(path) for path in sorted((tmp_path / "sweep").glob("*/record.json"))]
    assert [record.choices["quant"] for record in records] == ["mxfp8_mlp", "mxfp4_mlp"]
    assert all(record.status == "complete" for record in records)
    better, worse = (record.quality.all.fidelity.psnr for record in records)
    assert better > worse
    if launcher != "joblib":  # which shares the cores out by itself
        assert [record.environment.torch_threads for record in records] == [1, 1]
    assert (tmp_path / "sweep" / "report.html").stat().st_size > 1000


def test_a_slurm_sweep_asks_for_one_gpu_a_job():
    needs("submitit_slurm")
    cfg = load(["model=smoke", "sweep=submitit_slurm"], "run")
    assert cfg.hydra.launcher._target_.endswith("SlurmLauncher")
    assert (cfg.hydra.launcher.gpus_per_node, cfg.hydra.launcher.array_parallelism) == (1, 8)


@pytest.mark.parametrize("word", ["sweep=ray", "hydra/launcher=ray"])
def test_a_launcher_that_is_not_installed_names_its_extra(monkeypatch, capsys, word):
    monkeypatch.setitem(extras.LAUNCHERS, "ray", extras.Extra("ray", "hydra_plugins.no_such_launcher"))
    monkeypatch.setattr(sys, "argv", ["run.py", "-m", word])
    with pytest.raises(SystemExit, match="2"):
        cli()
    assert (
        f"{word}: hydra_plugins.no_such_launcher is not installed; install the extra [ray]" in capsys.readouterr().err
    )


def test_only_optional_choices_need_an_extra(monkeypatch):
    assert missing_launcher(["-m", "quant=ray", "hydra/launcher=basic", "sweep=null"]) is None
    assert missing_logger("lightning.pytorch.loggers.CSVLogger") is None
    monkeypatch.setitem(extras.LOGGERS, "WandbLogger", extras.Extra("wandb", "no_such_module"))
    assert "install the extra [wandb]" in missing_logger("lightning.pytorch.loggers.WandbLogger")
    monkeypatch.setitem(extras.LAUNCHERS, "ray", extras.Extra("ray", "no_such_package.module"))
    assert "no_such_package.module is not installed" in missing_launcher(["sweep=ray"])


def test_every_extra_is_one_that_the_project_offers():
    text = (ROOT / "pyproject.toml").read_text()
    for extra in (*extras.LAUNCHERS.values(), *extras.LOGGERS.values()):
        assert f"\n{extra.name} = [" in text
    assert importlib.metadata.version("hydra-core").startswith("1.3")
