"""A file is there whole or as it was before, and whoever is killed on the way leaves nothing that passes for one."""

import errno
import os
import resource
import signal
from pathlib import Path

import pytest
import torch

from harness.config import ConfigError, plan_run
from harness.files.tensors import read_safetensors, write_tensors
from harness.files.writing import append, remove_parts, replacing, why_unwritable, write_text


@pytest.fixture
def nothing_fits(monkeypatch):
    """The kernel refuses to make any file longer, as a full disk does; undone after the test."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size=0: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_text(path, "new" * 1000),
        lambda path: write_tensors(path, {"x": torch.ones(1000)}, {}),
        lambda path: append(path, b"new" * 1000),
    ],
    ids=["text", "tensors", "append"],
)
def test_what_does_not_fit_leaves_what_was_there_and_is_named(tmp_path, nothing_fits, write):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    nothing_fits(100)
    with pytest.raises(OSError, match=f"cannot write: .*{path}"):
        write(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_an_error_while_writing_leaves_the_file_and_no_part_of_another(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write():
        with replacing(path) as part:
            part.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_what_a_killed_process_had_begun_is_removed_and_nothing_else(tmp_path):
    for name in (".record.json.4711.part", ".a.mp4.1.part", "mine.part", ".hidden", ".x.part", "record.json"):
        (tmp_path / name).write_text("x")
    remove_parts(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".hidden", ".x.part", "mine.part", "record.json"]
    remove_parts(tmp_path / "not there")


def test_names_as_long_as_a_file_system_takes_them_are_written(tmp_path):
    path = tmp_path / ("é" * 125 + ".json")
    write_text(path, "x")
    assert path.read_text() == "x"


def test_tensors_come_back_with_what_was_said_of_them(tmp_path):
    write_tensors(tmp_path / "new" / "x.safetensors", {"x": torch.arange(3.0)}, {"a": "b"})
    assert torch.equal(read_safetensors(tmp_path / "new" / "x.safetensors")["x"], torch.arange(3.0))


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="cannot write") as caught:
        write_text(tmp_path / "file" / "record.json", "x")
    assert caught.value.errno in (errno.ENOTDIR, errno.EEXIST)


def test_what_cannot_be_written_is_told_before_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("kept")
    for good in ("file", "new", "some/new/folder/log.txt"):
        assert why_unwritable(tmp_path / good) is None
    assert why_unwritable(tmp_path) == "Is a directory"
    assert why_unwritable(tmp_path / "file" / "log.txt") == "Not a directory"
    assert why_unwritable(Path("/proc/nowhere/log.txt")) is not None
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "kept"
    os.mkfifo(tmp_path / "pipe")
    assert "named pipe" in why_unwritable(tmp_path / "pipe")


def test_an_incident_log_that_cannot_be_written_is_refused_before_the_run(composed, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"stability.incident_log=.*/file/log.txt: cannot be written \(Not a dir"):
        plan_run(composed("model=smoke", f"stability.incident_log={tmp_path}/file/log.txt"))
