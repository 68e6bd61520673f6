"""A command is told to users as they can type it."""

import io
import sys

import pytest

from harness import entries
from harness.bench import arguments
from harness.cli import COMMANDS
from harness.config import ROOT, ConfigError
from harness.report import schema
from harness.start import call
from harness.streams import PatientStream, complain

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


@pytest.mark.parametrize(
    ("parser", "words", "told"),
    [
        (arguments.rollout, ["--match", "("], "--match: (: no regular expression"),
        (arguments.rollout, ["--batches", "1,,2"], "--batches: : must be a whole number of at least 1"),
        (arguments.rollout, ["--batches", "1,-2"], "--batches: -2: must be a whole number of at least 1"),
        (arguments.rollout, ["--out", "/proc/x"], "--out: /proc/x: cannot be written to"),
        (arguments.micro, ["--json", "/proc/x.json"], "--json: /proc/x.json: cannot be written"),
        (arguments.profile, ["--out", "/proc/x.json"], "--out: /proc/x.json: cannot be written"),
        (arguments.tune_layer, ["--json", "/"], "--json: /: cannot be written (Is a directory)"),
    ],
)
def test_what_a_measuring_command_would_stumble_over_at_its_end_is_told_at_once(parser, words, told, capsys):
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(words)
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_an_output_that_can_be_written_is_a_path_and_nothing_is_left_there(tmp_path):
    given = arguments.micro().parse_args(["--json", str(tmp_path / "new" / "figures.json")])
    assert given.json == tmp_path / "new" / "figures.json"
    assert arguments.rollout().parse_args(["--batches", "1,4", "--out", str(tmp_path)]).batches == [1, 4]
    assert not list(tmp_path.iterdir())


def test_words_that_make_no_config_end_a_command_with_one_line(capsys):
    def command():
        raise ConfigError("model=nope: no such option")

    assert call(command) == 2
    assert capsys.readouterr().err == "error: model=nope: no such option\n"


def test_an_error_of_the_program_itself_keeps_its_traceback():
    def command():
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        call(command)


def test_what_a_file_brings_into_an_error_is_shown_and_not_obeyed(capsys):
    complain("clip \x1b[2J\x07\u202e\udcff of\ntwo lines, é")
    assert capsys.readouterr().err == "error: clip \\x1b[2J\\x07\\u202e\\udcff of\ntwo lines, é\n"


def test_letters_that_a_terminal_has_not_are_written_otherwise():
    raw = io.BytesIO()
    stream = PatientStream(io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    stream.write("2.0× \udcff")
    assert raw.getvalue() == b"2.0\\xd7 \\udcff"
    assert stream.lost is None


def test_the_schema_takes_no_words(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mx-world schema", "x"])
    assert schema.main() == 2
    assert capsys.readouterr().err == "error: x: the schema takes no arguments; see --help\n"
