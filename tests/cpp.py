"""Device code compiled for a CPU: one library a kernel and its parameters, the standard headers read once a process."""

from __future__ import annotations

import atexit
import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

COMPILER = shutil.which("g++")
OPTIONS = ("-std=c++17", "-O1", "-w", "-Wno-psabi", "-fPIC")
HEADERS = ("ucontext.h", "cmath", "cstdio", "cstdlib", "cstring", "memory", "random", "unordered_map", "vector")


@cache
def standard_headers() -> Path:
    """The headers of the standard library that tests include, compiled beside: reading them is half of a library."""
    folder = Path(tempfile.mkdtemp(prefix="headers"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    header = folder / "standard.hpp"
    header.write_text("".join(f"#include <{name}>\n" for name in HEADERS))
    subprocess.run([str(COMPILER), *OPTIONS, str(header), "-o", f"{header}.gch"], check=True)
    return header


def library(source: Path, macros: Sequence[str], path: Path) -> ctypes.CDLL:
    """``source`` compiled with ``macros`` to the library ``path``, and loaded."""
    first = ("-include", str(standard_headers()))  # else what was compiled is not used
    subprocess.run([str(COMPILER), *OPTIONS, "-shared", *first, *macros, str(source), "-o", str(path)], check=True)
    return ctypes.CDLL(str(path))
