"""A command is told to users as they can type it."""

import sys

import pytest

from harness import entries
from harness.bench import arguments
from harness.cli import COMMANDS
from harness.config import ROOT

HELP = "python scripts/gates.py outputs/run, then python harness/run.py; not python scripts/train_doom.py"


def test_every_script_is_there_and_every_command_it_stands_for():
    assert [path for path in entries.SCRIPTS.values() if not (ROOT / path).is_file()] == []
    assert set(entries.SCRIPTS) <= set(COMMANDS)


def test_in_a_clone_the_scripts_are_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["harness/run.py"])
    assert entries.entry("ladder") == "python scripts/ladder.py"
    assert entries.spelt(HELP) == HELP


@pytest.mark.parametrize("program", ["/env/bin/mx-world", "mx-world gates"])
def test_who_called_the_installed_command_is_told_that(monkeypatch, program):
    monkeypatch.setattr(sys, "argv", [program])
    assert entries.entry("ladder") == "mx-world ladder"
    assert entries.spelt(HELP) == "mx-world gates outputs/run, then mx-world run; not python scripts/train_doom.py"


def test_without_a_clone_there_is_no_script_to_name(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["notebook"])
    monkeypatch.setattr(entries, "__file__", str(tmp_path / "site" / "harness" / "entries.py"))
    assert entries.entry("run") == "mx-world run"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--seconds", "nan"], "--seconds: nan: must be a finite number of at least 0"),
        (["--seconds", "inf"], "must be a finite number"),
        (["--seconds=-1"], "--seconds: -1: must be a finite number of at least 0"),
        (["--warmup", "1_000"], "--warmup: 1_000: must be a whole number of at least 0"),
        (["--iterations", "0"], "--iterations: 0: must be a whole number of at least 1"),
        (["--batch", "1", str(2**63)], "must be a whole number of at least 1"),
        (["--iterations", "9" * 5000], "must be a whole number"),
    ],
)
def test_numbers_of_a_measuring_command_are_bounded(words, told, capsys):
    with pytest.raises(SystemExit) as ended:
        arguments.micro().parse_args(words)
    assert ended.value.code == 2
    assert told in (said := capsys.readouterr().err)
    assert len(said) < 1500
    assert arguments.micro().parse_args(["--seconds", "1.5", "--warmup", "0"]).seconds == 1.5
