"""Compiled Python modules in our cache, where Python keeps none: in images that are made so, each start compiled 3,800.

``PYTHONDONTWRITEBYTECODE``, usual in images of containers, and installers that compile nothing (uv) leave libraries
without bytecode beside them. Torch, its compiler and Lightning then took 25 s to import where they take 10. The first
start has other processes compile what it is about to import; what they are too late for, it compiles itself and keeps.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from harness.kernels.cache import folder
from harness.threads import usable_cores

COMPILED_FIRST = ("torch", "sympy", "triton", "lightning", "torchmetrics", "networkx", "mpmath")
"""Packages of many modules, most of which a run imports."""

ENOUGH_CORES = 4
"""With fewer, those that compile would take the time from the one that waits."""


def keep_bytecode() -> None:
    """Have Python keep bytecode in our cache, in this process and in those that it starts, where torch has none.

    For a command that is known to be right, before it imports anything large: help, and what is wrong with a word,
    start no processes. Where Python keeps bytecode itself nothing happens.
    """
    if not sys.dont_write_bytecode or sys.pycache_prefix is not None or _has_bytecode("torch"):
        return
    place = folder() / "bytecode"
    first = not place.exists()
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    sys.pycache_prefix, sys.dont_write_bytecode = str(place), False
    os.environ["PYTHONPYCACHEPREFIX"] = str(place)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    workers = usable_cores() - 1
    if first and workers >= ENOUGH_CORES:
        _compile_ahead(workers)


def _has_bytecode(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is None or spec.cached is None or Path(spec.cached).exists()


def _compile_ahead(workers: int) -> None:
    """Start one process for each worker, which find in the environment where bytecode goes; nobody waits for them."""
    found = [importlib.util.find_spec(package) for package in COMPILED_FIRST]
    places = [place for spec in found if spec is not None for place in spec.submodule_search_locations or ()]
    subprocess.Popen(
        [sys.executable, "-P", "-m", "compileall", "-qq", "-j", str(workers), *places],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
