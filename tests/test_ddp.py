"""Several processes give the figures of one, and none of them can make the others hang."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parent / "endings"))

import cells

from harness.ab import processes as parallel
from harness.ab.processes import ProcessError, Processes, check_clips, check_processes
from harness.config import ROOT, ConfigError, RunConf, TrainerConf, plan_run
from harness.measure.conf import RUN_ENDED, OnInstability
from harness.measure.stability import InstabilityError
from harness.report.journal import End, FinishedBatch, Journal, Line
from harness.report.record import FAILED, load_record
from harness.report.sections import BatchTimes, IncidentRecord
from harness.run import run

ODD = ["data.limit=3"]
"""Clips: processes do not get the same number of them."""
SMOKE = ["model=smoke", "model.arch.n_layers=2", "data.future_frames=2", "data.limit=4", "measure.parts_frames=0"]
SMOKE += ["quant=mxfp8_mlp", "kv=mx_v_only"]
BATCH = Line(batch=FinishedBatch(["a"], [], BatchTimes(["a"], [], {})))

BROKEN = """
import os, signal, sys
sys.path.insert(0, {root!r})
from harness.ab.module import RolloutModule
from harness.run import cli

plain = RolloutModule.predict_step

def predict_step(self, batch, batch_idx):
    {fault}
    return plain(self, batch, batch_idx)

RolloutModule.predict_step = predict_step
if __name__ == "__main__":
    cli()
"""


def start(folder, *words, fault=None):
    script = ROOT / "harness" / "run.py"
    if fault is not None:
        script = folder / "broken.py"
        script.write_text(BROKEN.format(root=str(ROOT), fault=fault))
    command = [sys.executable, str(script), *SMOKE, "trainer=ddp_cpu", f"hydra.run.dir={folder / 'run'}", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=180, check=False)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What a run in two processes said, and its folder."""
    folder = tmp_path_factory.mktemp("two")
    command = cells.command("ddp", folder / "run", resume=False, more=ODD)
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, folder


def test_two_processes_give_the_figures_of_one(two, composed, tmp_path):
    run(composed(*cells.SMOKE, *cells.MX, *ODD, "measure.videos=false"))
    alone = load_record(tmp_path / "run" / "record.json")
    said, folder = two
    both = load_record(folder / "run" / "record.json")
    assert both.environment.processes == 2
    assert alone.environment.processes == 1
    assert [clip.clip_id for clip in both.clips] == [clip.clip_id for clip in alone.clips]
    assert len({clip.clip_id for clip in both.clips}) == 3  # no clip twice though 3 is odd
    for one, two in zip(alone.clips, both.clips, strict=True):
        assert two.scores["fidelity"].psnr == pytest.approx(one.scores["fidelity"].psnr, abs=0.02)
    for metric in ("psnr", "ssim"):
        expected = getattr(alone.quality.all.fidelity, metric)
        assert getattr(both.quality.all.fidelity, metric) == pytest.approx(expected, abs=0.02)
    for name, arm in both.arms.items():
        assert arm.speed.total_ms.n == alone.arms[name].speed.total_ms.n == 3 * (3 - 1)  # clips, frames but the first
    rows = (folder / "run" / "frames.csv").read_text().splitlines()
    assert len(rows) == 1 + 3 * 3 * 2
    assert all((folder / "run" / clip.video).stat().st_size > 500 for clip in both.clips)
    assert said.count("fidelity, all clips (3)") == 1
    assert not (folder / "run" / "journal").exists()
    logged = (folder / "run" / "log" / "metrics.csv").read_text().splitlines()
    assert len(logged) == 1 + 3


@pytest.mark.slow
def test_a_run_in_two_processes_that_is_stopped_keeps_what_is_finished_and_goes_on_to_the_bit(two):
    cell = cells.measure("ddp", "SIGHUP", "middle", cells.figures("ddp", two[1] / "run"), more=ODD)
    assert cell.wrong == [], cell
    assert cell.kept >= 2


def test_a_process_that_fails_ends_the_run_and_finished_clips_are_kept(tmp_path):
    fault = 'if self.global_rank == 1: raise RuntimeError("injected")'
    done = start(tmp_path, "measure.videos=false", fault=fault)
    assert done.returncode == 1
    assert "error: process 1: RuntimeError: injected" in done.stderr
    record = load_record(tmp_path / "run" / "record.json")
    assert record.status == "failed"
    assert record.clips[0].clip_id == "synthetic_0000"
    assert record.incidents[0] == IncidentRecord("ProcessError", "process 1: RuntimeError: injected")


def test_a_killed_process_ends_the_run_soon_and_what_is_finished_stays(tmp_path):
    fault = "if self.global_rank == 1 and batch_idx == 1: os.kill(os.getpid(), signal.SIGKILL)"
    done = start(tmp_path, fault=fault)
    assert done.returncode == 1
    kept = list((tmp_path / "run" / "videos").glob("*.mp4"))
    assert len(kept) >= 2
    record = load_record(tmp_path / "run" / "record.json")
    assert record.status == "failed"
    assert record.incidents[0].message == "process 1 ended before it was done; its finished clips are kept"
    assert 2 <= len(record.clips) == len({clip.clip_id for clip in record.clips})
    assert (tmp_path / "run" / "frames.csv").exists()


@pytest.fixture
def first_process(tmp_path, monkeypatch):
    """The first of two processes, its partner a file that the test writes."""
    monkeypatch.setattr(parallel, "POLL_S", 0.001)
    monkeypatch.setattr(parallel, "PATIENCE_S", 0.05)
    partner = SimpleNamespace(poll=lambda: None)
    launcher = SimpleNamespace(procs=[partner])
    trainer = SimpleNamespace(is_global_zero=True, world_size=2, strategy=SimpleNamespace(launcher=launcher))
    processes = Processes(tmp_path, SimpleNamespace(clips=[]))
    processes.adopt(trainer)

    def told(*lines):
        for line in lines:
            Journal(tmp_path, 1).append(line)

    return SimpleNamespace(processes=processes, trainer=trainer, partner=partner, told=told)


def test_a_partner_that_died_is_not_waited_for(first_process):
    first_process.told(BATCH)
    first_process.partner.poll = lambda: -9
    with pytest.raises(ProcessError, match="process 1 ended before it was done"):
        first_process.processes.on_predict_end(first_process.trainer, None)


def test_a_partner_whose_candidate_is_unstable_ends_the_run_as_its_own_would(first_process):
    lost = IncidentRecord("structure", "arm candidate: clip a", "candidate", "a", 3, None, RUN_ENDED)
    first_process.told(BATCH, Line(end=End(FAILED, "InstabilityError: arm candidate: clip a", [lost])))
    with pytest.raises(InstabilityError, match="^arm candidate: clip a$") as raised:
        first_process.processes.on_predict_end(first_process.trainer, None)
    assert raised.value.incident.frame == 3


def test_a_partner_that_hangs_is_given_up(first_process):
    first_process.told(BATCH)
    with pytest.raises(ProcessError, match="process 1 finished no clip"):
        first_process.processes.on_predict_end(first_process.trainer, None)


def test_a_partners_failure_is_noticed_after_the_next_batch(first_process):
    first_process.told(BATCH, Line(end=End("failed", "NonFiniteError: arm bf16")))
    with pytest.raises(ProcessError, match="process 1: NonFiniteError: arm bf16"):
        first_process.processes.on_predict_batch_end(first_process.trainer, None, None, None, 0)


def test_processes_that_cannot_be_are_refused_before_they_start():
    with pytest.raises(ValueError, match=r"trainer.devices=2 in a sweep .*docs/sweeps.md"):
        check_processes(RunConf(trainer=TrainerConf(devices=2)), True)
    check_processes(RunConf(trainer=TrainerConf(devices=2)), False)
    check_processes(RunConf(), True)
    alone = RunConf(trainer=TrainerConf(devices=2), on_instability=OnInstability["fallback"])
    with pytest.raises(ValueError, match="on_instability=fallback with trainer.devices=2"):
        check_processes(alone, False)
    with pytest.raises(ValueError, match="2 processes for 1 clips: every process needs one; use trainer.devices=1"):
        check_clips(1, 2)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("trainer.devices=0", "trainer.devices=0: must be at least 1"),
        ("trainer.strategy=fsdp", "allowed are auto, ddp"),
    ],
)
def test_a_trainer_that_cannot_be_is_refused(composed, word, said):
    with pytest.raises(ConfigError, match=said):
        plan_run(composed("model=smoke", word))
