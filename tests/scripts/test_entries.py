"""Scripts are entries: what they do is in the package, and none touches where Python looks for modules."""

import ast
import os
import re
import signal
import subprocess
import sys
import tomllib

import pytest

from harness import start
from harness.cli import COMMANDS
from harness.config import ROOT

WHOLE = {"record_doom", "train_doom"}
"""The demo's making, which is no part of the product."""

SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
STARTED_AS_FILES = {ROOT / "harness" / name for name in ("run.py", "play.py", "judge.py")}


@pytest.mark.parametrize("path", [path for path in SCRIPTS if path.stem not in WHOLE], ids=lambda path: path.stem)
def test_a_script_only_calls_what_the_package_has(path):
    tree = ast.parse(path.read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    (place,) = [ast.literal_eval(node.args[0]) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    module, _, function = place.partition(":")
    source = ROOT / f"{module.replace('.', '/')}.py"
    assert f"\ndef {function}(" in source.read_text()
    assert str(source.relative_to(ROOT)) in ast.get_docstring(tree)


def test_nothing_edits_the_path_of_modules_but_what_is_started_as_a_file_of_the_package():
    sources = {*SCRIPTS, *(ROOT / "scripts" / "doom_world").glob("*.py"), *(ROOT / "harness").rglob("*.py")}
    assert {path for path in sources if "sys.path" in path.read_text()} == STARTED_AS_FILES


@pytest.mark.parametrize("words", [["check_parity.py"], ["bench_summary.py", "--models"]])
def test_a_script_starts_from_any_folder(words, tmp_path):
    script = str(ROOT / "scripts" / words[0])
    done = subprocess.run(
        [sys.executable, script, *words[1:]], cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 2
    assert f"usage: {words[0]}" in done.stderr


def test_a_reader_who_leaves_after_the_first_line_of_help_sees_no_traceback():
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, "-m", "harness", "--help"]
    done = subprocess.run(words, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", [name for name, (where, _) in COMMANDS.items() if ".bench." in where])
def test_measuring_commands_of_mx_world_are_the_scripts_functions(name):
    where = COMMANDS[name][0].partition(":")[0]
    assert any(f'start("{where}:main")' in path.read_text() for path in SCRIPTS)


def test_what_is_required_is_what_the_project_depends_on():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {re.match(r"[\w-]+", text)[0] for text in project["dependencies"]} == set(start.REQUIRED.values())
    assert project["requires-python"] == ">=" + ".".join(map(str, start.PYTHON))


@pytest.mark.parametrize("path", [*SCRIPTS, *sorted(STARTED_AS_FILES)], ids=lambda path: path.stem)
def test_without_its_packages_a_command_says_in_one_line_what_to_install(path, tmp_path):
    bare = [sys.executable, "-S", "-E", str(path), "--help"]  # sees nothing but Python's own library
    done = subprocess.run(bare, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert line.startswith(f"error: not installed for {sys.executable}: hydra-core, omegaconf, torch, torchao, ")
    assert line.endswith(f"or install them: pip install -c {ROOT / 'constraints.txt'} -e {ROOT}")


def test_what_is_named_is_what_is_missing(monkeypatch):
    assert start.why_not() is None
    monkeypatch.setattr(start, "REQUIRED", {"torch": "torch", "no_such_module": "no-such-package"})
    assert ": no-such-package; activate" in start.why_not()
    monkeypatch.setattr(start, "PYTHON", (9, 3))
    assert start.why_not().endswith("and this needs 9.3 or newer")


@pytest.mark.parametrize("code", [None, 0, 3])
def test_a_command_ends_with_the_code_of_its_function(code, monkeypatch):
    monkeypatch.setattr(start, "here", lambda: code, raising=False)
    with pytest.raises(SystemExit) as ended:
        start.start("harness.start:here")
    assert ended.value.code == code


def test_ctrl_c_ends_a_command_without_a_traceback_and_with_its_cleaning_up(tmp_path):
    script = tmp_path / "command.py"
    script.write_text(
        "import pathlib, signal, os\n"
        "from harness.start import start, hush\n"
        "def work():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        signal.pause()\n"
        "    finally:\n"
        "        pathlib.Path('cleaned').touch()\n"
        "if __name__ == '__main__':\n"
        "    start('command:work')\n"
    )
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background ignores
        check=False,
    )
    assert (done.returncode, done.stderr) == (130, "stopped by SIGINT\n")
    assert (tmp_path / "cleaned").exists()


def test_the_reference_names_every_script_and_command():
    text = (ROOT / "docs" / "reference.md").read_text()
    assert [path.name for path in SCRIPTS if path.name not in text] == []
    assert [name for name in COMMANDS if f"`{name}`" not in text] == []
