"""How a user calls a command: ``python scripts/ladder.py`` in a clone, ``mx-world ladder`` once installed."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import math
import re
import sys
from pathlib import Path

from harness.files.writing import folder_problem, why_unwritable

SCRIPTS = {
    "run": "harness/run.py",
    "play": "harness/play.py",
    "ladder": "scripts/ladder.py",
    "gates": "scripts/gates.py",
    "report": "scripts/report.py",
    "export": "scripts/export.py",
    "bench": "scripts/bench_rollout.py",
    "microbench": "scripts/microbench.py",
    "profile": "scripts/profile_frame.py",
    "tune": "scripts/tune_layer.py",
    "parity": "scripts/check_parity.py",
    "world-model": "scripts/check_world_model.py",
}
"""The file that a clone has for each sub-command."""

_CALLS = re.compile("python (" + "|".join(re.escape(path) for path in SCRIPTS.values()) + r")\b")


def installed() -> bool:
    """Whether the user called ``mx-world``, or has no clone whose files could be called."""
    clone = Path(__file__).resolve().parents[1]
    return Path(sys.argv[0]).name.startswith("mx-world") or not (clone / SCRIPTS["ladder"]).is_file()


def entry(name: str) -> str:
    """What to type for a sub-command, up to its arguments.

    Raises:
        KeyError: For a name that is none.
    """
    path = SCRIPTS[name]
    return f"mx-world {name}" if installed() else f"python {path}"


def spelt(text: str | None) -> str:
    """``text``, written for a clone, with its commands as this user types them."""
    names = {path: name for name, path in SCRIPTS.items()}
    return _CALLS.sub(lambda call: entry(names[call[1]]), text or "")


def command_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose ``--help`` begins with ``doc``, a module's docstring, laid out as it stands and :func:`spelt`.

    Its numbers (``type=int``, ``type=float``) are finite, not negative and of 64 bits; :func:`count` is at least 1.
    """
    parser = argparse.ArgumentParser(description=spelt(doc), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.register("type", int, _whole)
    parser.register("type", float, _finite)
    return parser


def _whole(text: str, least: int = 0) -> int:
    if len(text) > 19 or not text.isascii() or not text.isdigit() or not least <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"{text:.24}: must be a whole number of at least {least}")
    return int(text)


def count(text: str) -> int:
    """A number of things, at least 1, for a parser's ``type``."""
    return _whole(text, 1)


def counts(text: str) -> list[int]:
    """Such numbers with commas between, for a parser's ``type``."""
    return [count(one) for one in text.split(",")]


def pattern(text: str) -> str:
    """A regular expression, for a parser's ``type``."""
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"{text:.60}: no regular expression: {error}") from error
    return text


def output(text: str) -> Path:
    """A file to write, for a parser's ``type``: tried at once, not when all is measured."""
    if (why := why_unwritable(Path(text))) is not None:
        raise argparse.ArgumentTypeError(f"{text}: cannot be written ({why}); name another file")
    return Path(text)


def output_folder(text: str) -> Path:
    """A folder to write into, likewise."""
    if (problem := folder_problem(Path(text))) is not None:
        raise argparse.ArgumentTypeError(problem)
    return Path(text)


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text:.24}: must be a finite number of at least 0")
    return value


def module_doc(name: str) -> str:
    """The docstring of a module that need not be imported for it."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
