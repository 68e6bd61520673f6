"""May a world model run in MX formats? Rolls it out in BF16 and in MX, and compares speed, memory and quality.

From Python: ``harness.compose`` makes a config from words, ``harness.run`` runs it; see docs/python.md.
"""

from __future__ import annotations

import importlib
from typing import Any

from harness.threads import wait_passively

__version__ = "0.1.0"

_PLACES = {"compose": "harness.config.compose"}
"""Names of the package that are imported when they are first used: ``import harness`` is cheap."""

wait_passively()  # before anything here imports torch


def __getattr__(name: str) -> Any:
    if name == "run":  # a module that can be called
        return importlib.import_module("harness.run")
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'harness' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), "run", *_PLACES])
