"""A module of this room as a process of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import harness


def child(module: str, *words: str) -> dict[str, Any]:
    """Arguments of ``subprocess.run`` for ``python -m harness.bench.MODULE WORDS``, from any folder."""
    package = str(Path(harness.__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    return {
        "args": [sys.executable, "-m", f"harness.bench.{module}", *words],
        "env": {**os.environ, "PYTHONPATH": path},
    }
