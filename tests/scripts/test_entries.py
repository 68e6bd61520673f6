"""Scripts are entries: what they do is in the package, and none touches where Python looks for modules."""

import ast
import os
import subprocess
import sys

import pytest

from harness.cli import COMMANDS
from harness.config import ROOT

WHOLE = {"record_doom", "train_doom"}
"""The demo's making, which is no part of the product."""

SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
STARTED_AS_FILES = {ROOT / "harness" / "run.py", ROOT / "harness" / "play.py"}


@pytest.mark.parametrize("path", [path for path in SCRIPTS if path.stem not in WHOLE], ids=lambda path: path.stem)
def test_a_script_only_calls_what_the_package_has(path):
    tree = ast.parse(path.read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    (module,) = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module.startswith("harness")]
    source = ROOT / f"{module.module.replace('.', '/')}.py"
    assert source.is_file()
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
    assert any(f"from {where} import main" in path.read_text() for path in SCRIPTS)


def test_the_reference_names_every_script_and_command():
    text = (ROOT / "docs" / "reference.md").read_text()
    assert [path.name for path in SCRIPTS if path.name not in text] == []
    assert [name for name in COMMANDS if f"`{name}`" not in text] == []
