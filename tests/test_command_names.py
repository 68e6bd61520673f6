"""A command is told to users as they can type it."""

import sys

import pytest

from harness import entries
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
