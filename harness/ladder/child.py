"""Each trial is a run of the harness in a process of its own."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from harness.config.places import PACKAGE
from harness.signals import STOPPING

Launch = Callable[[Sequence[str], Path], int]
"""Runs the harness with these words, outputs in this folder; returns its exit code."""

LOG = "console.log"
PATIENCE_S = 30
"""Seconds that an interrupted run has to end."""
SAID = 300
"""Characters of a run's last words that are quoted."""
INTERRUPTED = tuple(128 + number for number in STOPPING)
"""Exit codes of a run that a signal stopped."""
PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: the signal that a process gets when the one that started it is gone."""


def launch_process(words: Sequence[str], folder: Path) -> int:
    """Run the harness as a process of its own; what it prints goes to ``console.log`` in its folder.

    It ends before this process does: told to where a signal ends the ladder, and by the kernel where the ladder is
    killed, so that no run that nobody waits for takes time from the ones of the next climb.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(PACKAGE / "run.py"), *words, f"hydra.run.dir={quoted(folder)}"]
    with (folder / LOG).open("a", encoding="utf-8") as log:
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, preexec_fn=_end_with_parent)
        try:
            return child.wait()
        except BaseException:
            _end(child)
            raise


def _end(child: subprocess.Popen[bytes]) -> None:
    """Tell the run to end and wait for it; a second signal, or a run that does not hear, ends the waiting."""
    child.terminate()
    try:
        child.wait(PATIENCE_S)
    except BaseException:
        child.kill()
        child.wait()


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def quoted(value: object) -> str:
    """A value that Hydra's override grammar takes as it is."""
    text = str(value).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"


def last_words(folder: Path) -> str:
    """The last line that a run printed; empty if it printed none."""
    try:
        with (folder / LOG).open("rb") as log:
            log.seek(max(0, (folder / LOG).stat().st_size - 10_000))
            lines = log.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return next((line.strip()[:SAID] for line in reversed(lines) if line.strip()), "")
