"""The command itself: one real process, and the rest in this one."""

import os
import resource
import subprocess
import sys
from contextlib import contextmanager

import av
import pytest
from hydra.core.global_hydra import GlobalHydra

from harness.config import ROOT
from harness.report.gates import GateError
from harness.report.record import load_record
from harness.run import cli

COMMAND = [sys.executable, str(ROOT / "harness" / "run.py")]
QUICK = ["model=smoke", "model.arch.n_layers=2", "data.limit=2", "data.future_frames=3", "measure.parts_frames=1"]


def test_one_command_leaves_table_record_figures_and_videos(tmp_path):
    """From any folder, with nothing installed and nothing on PYTHONPATH."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    words = [*QUICK, "quant=mxfp8_all", "kv=mx_v_only"]
    done = subprocess.run(
        [*COMMAND, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (path for path in (tmp_path / "outputs").iterdir() if path.is_dir())  # beside it: incidents.log
    assert folder.name.endswith("_smoke_mxfp8_all_mx_v_only")
    record = load_record(folder / "record.json")
    assert record.status == "complete"
    assert record.overrides == words
    assert len(record.clips) == 2
    table = (folder / "table.txt").read_text()
    for text in ("FPS, pipeline", "fidelity", "Random weights", "emulated", "mxfp8_all + mx_v_only"):
        assert text in table
        assert text in done.stdout
    assert "clips 2/2" in done.stdout
    assert "Traceback" not in done.stderr
    for clip in record.clips:
        with av.open(str(folder / clip.video)) as video:
            assert video.streams.video[0].codec_context.name == "h264"
    assert {file.name for file in folder.iterdir()} >= {"frames.csv", "log", "videos", ".hydra"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["quant=mxfp5"], "mxfp4_mlp"),
        (["quant.scope=heads"], "must be one of mlp, attn, modulation, all"),
        (["quant=mxfp8_mlp", "quant.kernel=triton", "quant.element_8bit=e5m2", "quant.bits=5"], "bits=5: allowed"),
        (["model.checkpoint=missing.pt"], "model.checkpoint=missing.pt: no such file"),
        (["data.limit=0"], "limit=0: must be at least 1"),
    ],
)
def test_what_a_user_got_wrong_is_one_message_and_exit_code_2(command, words, said):
    code, err = command("model=smoke", *words)
    assert code == 2
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("os.system", "is no logger"),
        ("pathlib.Path", "is no logger"),
        ("nowhere.At", "no such class"),
    ],
)
def test_a_config_calls_nothing_but_loggers(command, tmp_path, target, said):
    (tmp_path / "mine" / "logger").mkdir(parents=True)
    (tmp_path / "mine" / "logger" / "own.yaml").write_text(f"_target_: {target}\ncommand: touch owned\n")
    code, err = command("model=smoke", "--config-dir", str(tmp_path / "mine"), "logger=own")
    assert code == 2
    assert err.startswith(f"error: logger._target_={target}: {said}")
    assert not (tmp_path / "owned").exists()


def test_a_checkpoint_that_would_run_code_is_refused(command, game, overrides, tmp_path):
    import torch

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"model": Payload()}, tmp_path / "evil.pt")
    code, err = command(*overrides(game, **{"model.checkpoint": tmp_path / "evil.pt"}))
    assert code == 2
    assert "evil.pt: refused" in err
    assert not (tmp_path / "owned").exists()


def test_a_verdict_sets_the_exit_code_where_it_was_asked_for(command, tmp_path):
    words = [*QUICK, "measure.videos=false", "quant=mxfp8_mlp", "hydra.run.dir=run"]
    assert command(*words)[0] == 0
    gates = load_record(tmp_path / "run" / "record.json").gates
    assert (gates.title, gates.verdict) == ("default gate", "undecided")
    assert "random weights" in gates.reason
    assert (
        (tmp_path / "run" / "table.txt").read_text().startswith("Verdict (default gate, without speed, against BF16)")
    )
    for asked in ("gates=d", "gates.max_psnr_drop=0.3"):
        assert command(*words, asked, "hydra.run.dir=again", "overwrite=true")[0] == 4


def test_a_gate_that_cannot_be_evaluated_keeps_the_finished_run(command, monkeypatch, tmp_path):
    def broken(*_):
        raise GateError("gates: no figure")

    monkeypatch.setattr("harness.ab.conclude.evaluate", broken)
    words = [*QUICK, "measure.videos=false", "quant=mxfp8_mlp", "gates=d", "hydra.run.dir=run"]
    code, err = command(*words)
    assert (code, err.strip().splitlines()[-1]) == (2, "error: gates: no figure")
    record = load_record(tmp_path / "run" / "record.json")
    assert (record.status, len(record.clips), record.gates) == ("complete", 2, None)


@contextmanager
def small_files(size: int):
    """Files of this process cannot grow beyond so many bytes, as on a disk that is nearly full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:  # at once: what pytest writes to may be a longer file
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_ends_with_the_table_on_the_screen_and_the_file_named(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(sys, "argv", ["run.py", *QUICK, "measure.videos=false", "quant=mxfp8_mlp", "hydra.run.dir=run"])
    monkeypatch.chdir(tmp_path)
    GlobalHydra.instance().clear()
    with small_files(10_000), pytest.raises(SystemExit) as stop:
        cli()
    said = capfd.readouterr()
    assert stop.value.code == 2
    assert "FPS, pipeline (DiT)" in said.out
    error = next(line for line in said.err.splitlines() if line.startswith("error: "))
    assert "record.json" in error
    assert "File too large" in said.err
    assert "Traceback" not in said.err
    assert (tmp_path / "run" / "frames.csv").is_file()
    assert not list((tmp_path / "run").glob("*record.json*"))


def test_a_sweep_goes_on_after_a_job_that_cannot_run(command, tmp_path):
    words = [*QUICK, "measure.videos=false", "quant=mxfp8_mlp", "kv=mx_v_only", "hydra.sweep.dir=sweep"]
    code, err = command("-m", *words, "quant.bits=3,8")
    assert code == 2
    assert "bits=3: allowed are 8 and 4" in err
    assert "Traceback" not in err
    finished = list((tmp_path / "sweep").glob("*/record.json"))
    assert [path.parent.name for path in finished] == ["1_smoke_mxfp8_mlp_mx_v_only"]
