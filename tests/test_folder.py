"""A run's folder is that run's alone, and what lies in it beside is neither shown nor removed."""

import errno
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from report_cases import record

from harness.ab.folder import FolderError, RunFolder
from harness.ab.results import FORMULA, _csv, _rows
from harness.config import ROOT
from harness.report.files import LOCK, is_running
from harness.report.journal import FinishedBatch
from harness.report.page.run_page import write_run_page
from harness.report.record import load_record
from harness.report.sections import BatchTimes, FrameTimes
from harness.run import run

SMOKE = ["model=smoke", "model.arch.n_layers=2", "data.future_frames=2", "data.limit=1", "measure.parts_frames=0"]


def typed(folder, *words):
    command = [sys.executable, str(ROOT / "harness" / "run.py"), *SMOKE, *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, check=False)


def test_runs_started_together_have_folders_of_their_own(tmp_path):
    with ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda _: typed(tmp_path, "measure.videos=false"), range(2)))
    assert [one.returncode for one in done] == [0, 0], [one.stderr for one in done]
    folders = [path.parent for path in (tmp_path / "outputs").glob("*/record.json")]
    assert len(folders) == 2
    assert {load_record(folder / "record.json").run_id for folder in folders} == {folder.name for folder in folders}


def test_of_two_runs_in_one_folder_the_second_is_refused(tmp_path):
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    first.claim(resume=False, overwrite=False)
    assert is_running(tmp_path / "run")
    for words in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(FolderError, match="another run is writing to it right now"):
            second.claim(**{"resume": False, "overwrite": False, **words})
    first.release()
    assert not is_running(tmp_path / "run")
    second.claim(resume=True, overwrite=False)


@pytest.fixture
def used(tmp_path):
    """A folder that a run has used, with something of the user's beside it."""
    folder = tmp_path / "run"
    (folder / "videos").mkdir(parents=True)
    (folder / "journal").mkdir()
    for name in ("record.json", "report.html", "videos/clip.mp4", "journal/0.jsonl", ".record.json.4711.part"):
        (folder / name).write_text("x")
    (folder / "thesis.tex").write_text("years of work")
    (folder / "notes").mkdir()
    (folder / "notes" / "a").write_text("x")
    return folder


def test_a_used_folder_is_refused_and_nothing_in_it_touched(used):
    with pytest.raises(FolderError, match=r"an earlier run is in it .*resume=true .* overwrite=true"):
        RunFolder(used).claim(resume=False, overwrite=False)
    assert (used / "record.json").read_text() == "x"
    assert not (used / LOCK).exists()


def test_overwriting_removes_a_runs_own_files_by_name_and_nothing_else(used, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("x")
    (used / "wandb").symlink_to(tmp_path / "elsewhere")
    RunFolder(used).claim(resume=False, overwrite=True)
    assert sorted(os.listdir(used)) == ["notes", LOCK, "thesis.tex"]
    assert (tmp_path / "elsewhere" / "kept").exists(), "a link is removed, not what it leads to"


def test_a_folder_of_others_files_is_refused_whatever_is_said(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for words in ({"resume": True}, {"overwrite": True}, {}):
        with pytest.raises(FolderError, match=r"holds other files \(thesis.tex\)"):
            RunFolder(tmp_path).claim(**{"resume": False, "overwrite": False, **words})
    assert os.listdir(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize(
    "words",
    [
        ["quant.late_layer=4"],
        ["model.checkpoint=nowhere.pt"],
        ["data=clips", "data.paths=[nowhere]"],
        ["d_model=10000000"],
        ["gates=b", "gates.baseline=nowhere.json"],
    ],
)
def test_a_command_that_is_refused_leaves_no_folder(command, tmp_path, words):
    code, said = command(*SMOKE, *words, "hydra.run.dir=run")
    assert code == 2
    assert re.fullmatch(r"error: [^\n]+(\n  [^\n]+)*\n?", said), said
    assert os.listdir(tmp_path) == []


def test_the_page_shows_no_video_that_its_record_does_not_name(composed, tmp_path):
    """Of an earlier run, under a clip's name or beside it; or one that has taken the place of its own."""
    run(composed(*SMOKE, "quant=mxfp8_mlp"))
    folder = tmp_path / "run"
    own = load_record(folder / "record.json").clips[0].video
    page = write_run_page(folder).read_text()
    assert page.count('<figure class="player"') == 1
    (folder / "videos" / "stray.mp4").write_bytes((folder / own).read_bytes())
    assert write_run_page(folder).read_text() == page
    (folder / own).write_bytes((folder / own).read_bytes() + b"another run's")
    page = write_run_page(folder).read_text()
    assert '<figure class="player"' not in page
    assert f"Not found: {own}" in page


def test_no_text_of_frames_csv_is_a_formula():
    clip = record().clips[0]
    times = FrameTimes(dit_ms=[1.0] * 8, decoder_ms=[1.0] * 8, prefill_ms=1.0)
    for start in (*FORMULA, " =", "\u3000+"):
        text = f"{start}HYPERLINK(1)"
        clip.clip_id = clip.tag = text
        batch = FinishedBatch([text], [clip], BatchTimes([text], ["bf16"], {"bf16": times, text: times}))
        rows = _csv(_rows(batch), heading=False)
        cells = [text if cell is None else cell for cell in re.findall(r'(?:^|,)"?([^",]*)', rows, re.MULTILINE)]
        assert "'" + text.replace('"', '""') in rows
        assert not any(cell.lstrip().startswith(FORMULA[:4]) for cell in cells), rows


def test_a_file_system_without_locks_is_said_in_the_log(composed, game, overrides, tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("harness.files.locks.fcntl.flock", no_locks)
    run(composed(*overrides(game), "data.limit=1", "data.future_frames=1"))
    assert "no lock keeps another run out of this folder (No locks available)" in (tmp_path / "run/run.log").read_text()


def test_a_killed_process_leaves_no_lock(tmp_path):
    script = "import os, sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
    script += "from harness.ab.folder import RunFolder; RunFolder(Path('run')).claim(False, False)\n"
    script += "os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", script, str(ROOT)], cwd=tmp_path, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not is_running(tmp_path / "run")
    RunFolder(tmp_path / "run").claim(resume=False, overwrite=False)
