"""Where Python keeps no bytecode, it is kept in our cache."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness import bytecode

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import sys
sys.path.insert(0, {libraries!r})
from harness import bytecode
bytecode.COMPILED_FIRST = ("torch",)
bytecode.usable_cores = lambda: {cores}
bytecode.keep_bytecode()
import torch
"""


@pytest.fixture
def start(tmp_path):
    """Import a "torch" of two modules, one of which nobody imports, in a process; returns all bytecode there is."""
    libraries = tmp_path / "libraries" / "torch"
    libraries.mkdir(parents=True)
    (libraries / "__init__.py").write_text("")
    (libraries / "later.py").write_text("")

    def run(cores=2, **environment):
        script = SCRIPT.format(libraries=str(libraries.parent), cores=cores)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        places = {"PYTHONPATH": str(ROOT), "MX_HARNESS_CACHE": str(tmp_path / "cache")}
        subprocess.run([sys.executable, "-c", script], env=inherited | places | environment, check=True, timeout=60)
        kept = [path for path in tmp_path.rglob("*.pyc") if path.parent.name == "torch" or "torch" in path.parts[-3:]]
        beside = [path for path in kept if path.is_relative_to(tmp_path / "libraries")]
        return {path.name.split(".")[0] for path in kept}, beside

    return run


def test_what_is_imported_is_kept_in_the_cache_and_not_beside_it(start):
    assert start(PYTHONDONTWRITEBYTECODE="1") == ({"__init__"}, [])


def test_python_keeps_it_itself_unless_told_not_to(start, tmp_path):
    kept, beside = start()
    assert kept == {"__init__"}
    assert len(beside) == 1
    assert start(PYTHONDONTWRITEBYTECODE="1")[1] == beside  # and what it has is taken
    assert not (tmp_path / "cache").exists()


def test_a_first_start_has_all_of_it_compiled_where_cores_are_many(start):
    for _ in range(100):  # by processes that nobody waits for
        kept, beside = start(cores=8, PYTHONDONTWRITEBYTECODE="1")
        if kept == {"__init__", "later"}:
            break
    assert kept == {"__init__", "later"}
    assert beside == []


def test_a_folder_that_cannot_be_made_leaves_all_as_it_was(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MX_HARNESS_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(bytecode, "_has_bytecode", lambda package: False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "pycache_prefix", None)
    bytecode.keep_bytecode()
    assert (sys.pycache_prefix, sys.dont_write_bytecode) == (None, True)
