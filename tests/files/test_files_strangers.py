"""What is no regular file, or counts without end, at every reader that a stranger's file may reach."""

import errno
import json
import os

import pytest
import torch
from safetensors.torch import save_file

from harness.calib.store import load as load_calibration
from harness.files import locks
from harness.files.kept import StaleError
from harness.files.text import FileError, parse_json
from harness.ladder.state import LadderError, locked
from harness.ladder.state import load as load_ladder
from harness.live.protocol import ProtocolError, parse
from harness.models.checkpoint import read_checkpoint
from harness.report.journal import Journal
from harness.report.record import RecordError, load_record
from harness.session.recording import Recording
from harness.session.state import FORMAT, SessionState, StateError

READERS = {
    "record": (load_record, RecordError),
    "ladder": (load_ladder, LadderError),
    "session": (SessionState.load, StateError),
    "recording": (Recording.load, StateError),
    "calibration": (lambda path: load_calibration(path, torch.nn.Module(), {}), StaleError),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_pipe_or_a_folder_is_refused_and_never_waited_for(tmp_path, reader):
    read, error = READERS[reader]
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    for name, told in (("pipe", "not a regular file"), ("folder", "is a folder")):
        with pytest.raises(error, match=told):
            read(tmp_path / f"{name}.safetensors")


def test_a_journal_that_is_a_pipe_is_refused(tmp_path):
    (tmp_path / "journal").mkdir()
    os.mkfifo(tmp_path / "journal" / "0.jsonl")
    with pytest.raises(FileError, match="not a regular file"):
        Journal(tmp_path, 0).new_lines()


@pytest.mark.parametrize("deep", [65, 900, 100_000])
def test_json_is_as_deep_as_is_said_whatever_the_python(deep):
    with pytest.raises(FileError, match="nested"):
        parse_json("[" * deep + "]" * deep)
    with pytest.raises(FileError, match="nested"):
        parse_json('{"a":' * deep + "1" + "}" * deep)
    assert parse_json("[" * 64 + "]" * 64)


@pytest.mark.parametrize("fps", ["9" * 2000, "1e999", "-" + "9" * 1000, "NaN"])
def test_a_message_with_an_endless_number_is_a_complaint(fps):
    with pytest.raises(ProtocolError):
        parse(f'{{"type": "limit", "fps": {fps}}}')


@pytest.mark.parametrize(
    "header",
    [
        {"arm": "bf16", "frame": 10**30, "seed": 0, "names": ["a"]},
        {"arm": "bf16", "frame": 1e300, "seed": 0, "names": ["a"]},
        {"arm": "bf16", "frame": -1, "seed": 0, "names": ["a"]},
        {"arm": "bf16", "frame": 1, "seed": True, "names": ["a"]},
        {"arm": "bf16", "frame": 1, "seed": 0, "names": "abc"},
        {"arm": ["bf16"], "frame": 1, "seed": 0, "names": []},
        {"frame": 1},
    ],
)
def test_a_state_whose_counters_lie_is_refused(tmp_path, header):
    tensors = {f"bf16.{name}": torch.zeros(1) for name in ("latents", "mouse", "btn")}
    save_file(tensors, tmp_path / "s.safetensors", {"format": FORMAT, "version": "1", "header": json.dumps(header)})
    with pytest.raises(StateError):
        SessionState.load(tmp_path / "s.safetensors")


def test_a_file_system_without_locks_is_no_other_process(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", no_locks)
    with locked(tmp_path):
        pass
    assert "no lock keeps another ladder out" in capsys.readouterr().out


def test_a_checkpoint_that_is_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(ValueError, match="not a regular file"):
        read_checkpoint(tmp_path / "pipe.pt")
