"""Faults in the middle of a run: what the user is told, and that what was finished is kept."""

import os
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from harness.ab.module import RolloutModule
from harness.report.journal import load_run
from harness.report.record import load_record
from harness.rollout import Rollout
from harness.run import cli
from harness.signals import STOPPING, Signals, Stopped

SMOKE = ["model=smoke", "model.arch.n_layers=2", "data.future_frames=2", "measure.parts_frames=0", "quant=mxfp8_mlp"]


@pytest.fixture
def command(monkeypatch, tmp_path, capfd):
    """Run the command with these words and outputs in ``run``; returns its exit code and what it said."""

    # A process started in the background ignores Ctrl-C, and a run keeps to that; these tests are about others.
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)

    def run_words(*words):
        monkeypatch.setattr(sys, "argv", ["run.py", *SMOKE, f"hydra.run.dir={tmp_path / 'run'}", *words])
        monkeypatch.chdir(tmp_path)
        GlobalHydra.instance().clear()
        with pytest.raises(SystemExit) as stop:
            cli()
        said = capfd.readouterr()
        assert "Traceback" not in said.err
        return stop.value.code, said

    yield run_words
    signal.signal(signal.SIGINT, ignored)


@pytest.fixture
def before_batch(monkeypatch):
    """Have something happen in the run before its batch ``number`` is rolled out."""
    plain = RolloutModule.predict_step

    def install(number, happen):
        def step(self, batch, batch_idx):
            if batch_idx == number:
                happen()
            return plain(self, batch, batch_idx)

        monkeypatch.setattr(RolloutModule, "predict_step", step)

    return install


def test_a_sweep_that_breaks_off_says_what_is_left(monkeypatch, capfd):
    def broken():
        raise RuntimeError("a worker was killed")

    monkeypatch.setattr("harness.run.main", broken)
    for words, told in ((["-m", "quant=bf16,mxfp8_mlp"], True), (["quant=bf16"], False)):
        monkeypatch.setattr(sys, "argv", ["run.py", *words])
        with pytest.raises(RuntimeError, match="a worker was killed"):
            cli()
        said = capfd.readouterr().err
        assert ("error: the sweep broke off: a worker was killed\nEach job's folder keeps" in said) == told


def caches(folder, clips=4):
    """Latent caches of clips for the smoke model."""
    folder.mkdir()
    for number in range(clips):
        torch.manual_seed(number)
        content = {"vid": torch.randn(10, 16, 4, 4), "mouse": torch.randn(10, 2), "button": torch.zeros(10, 11)}
        torch.save(content, folder / f"clip_{number}.pt")
    return ["data=owl_cache", f"data.paths=[{folder}]"]


def test_ctrl_c_keeps_the_finished_clips_and_ends_with_130(command, before_batch, tmp_path):
    before_batch(2, lambda: signal.raise_signal(signal.SIGINT))
    code, said = command("data.limit=4")
    assert code == 130
    assert "Incident: Interrupted: stopped by SIGINT; finished clips are kept" in said.out
    record = load_record(tmp_path / "run" / "record.json")
    assert (record.status, len(record.clips)) == ("interrupted", 2)
    assert all((tmp_path / "run" / clip.video).is_file() for clip in record.clips)


@pytest.mark.parametrize("size", [0, 1000, 6000])
def test_a_clip_cut_off_while_the_run_lasts_is_named(command, before_batch, tmp_path, size):
    words = caches(tmp_path / "cache")
    before_batch(1, lambda: os.truncate(tmp_path / "cache" / "clip_3.pt", size))
    code, said = command(*words, "data.limit=4", "data.num_workers=0")
    assert code == 2
    assert said.err.strip().splitlines()[-1].startswith(f"error: {tmp_path / 'cache' / 'clip_3.pt'}: not a readable")
    record = load_record(tmp_path / "run" / "record.json")
    assert (record.status, [clip.clip_id for clip in record.clips]) == ("failed", ["clip_0", "clip_1", "clip_2"])
    assert record.incidents[0].kind == "ClipError"


def test_what_is_finished_is_recorded_while_the_run_lasts(command, before_batch, tmp_path):
    """So a process that is killed (out of memory, say) leaves it; see also test_ddp.py."""
    seen = []

    def look():
        seen.append(load_run(tmp_path / "run"))
        signal.raise_signal(signal.SIGINT)

    before_batch(2, look)
    command("data.limit=4")
    assert (seen[0].status, len(seen[0].clips)) == ("running", 2)
    assert [times.clips for times in seen[0].timings] == [[clip.clip_id] for clip in seen[0].clips]
    assert all((tmp_path / "run" / clip.video).is_file() for clip in seen[0].clips)


def test_a_signal_that_python_drops_ends_the_run_within_a_frame(command, monkeypatch, tmp_path):
    """In a ``__del__`` an exception is printed and lost; it must not be so for the signal that raised it."""

    class Gone:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    frames = []
    plain = Rollout.next_frame

    def next_frame(self, *args):
        frames.append(None)
        if len(frames) == 6:
            Gone()
        return plain(self, *args)

    monkeypatch.setattr(Rollout, "next_frame", next_frame)
    code, said = command("data.limit=4")
    assert (code, len(frames)) == (143, 6)
    assert said.err.splitlines()[-1] == "stopped by SIGTERM"
    record = load_record(tmp_path / "run" / "record.json")
    assert (record.status, len(record.clips)) == ("interrupted", 1)


def test_a_log_that_cannot_be_written_costs_nothing(command, monkeypatch, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.log").symlink_to("/dev/full")
    code, _ = command("data.limit=1", "resume=true", "gates=d")
    assert code == 4
    assert load_record(tmp_path / "run" / "record.json").status == "complete"


def test_a_second_signal_of_the_same_end_does_not_break_off_what_the_first_one_cleans_up(monkeypatch):
    """Of a terminal that is gone a process learns twice: by itself, and by the process that started it."""
    now = [100.0]
    monkeypatch.setattr("harness.signals.time", SimpleNamespace(monotonic=lambda: now[0]))
    cleaned = []

    def ended():
        try:
            signal.raise_signal(signal.SIGHUP)
        finally:
            signal.raise_signal(signal.SIGTERM)
            cleaned.append(True)

    ignored = {name: signal.signal(name, signal.SIG_DFL) for name in STOPPING}  # as in a shell's background
    with Signals():
        with pytest.raises(Stopped) as stopped:
            ended()
        now[0] += 3
        with pytest.raises(Stopped, match="SIGINT"):  # somebody means it
            signal.raise_signal(signal.SIGINT)
    for name, handler in ignored.items():
        signal.signal(name, handler)
    assert cleaned == [True]
    assert stopped.value.signal == signal.SIGHUP
