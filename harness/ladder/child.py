"""Each trial is a run of the harness in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from harness.config.places import PACKAGE

Launch = Callable[[Sequence[str], Path], int]
"""Runs the harness with these words, outputs in this folder; returns its exit code."""

LOG = "console.log"
PATIENCE_S = 10
"""Seconds that an interrupted run has to end."""
SAID = 300
"""Characters of a run's last words that are quoted."""
INTERRUPTED = (130, 143)
"""Exit codes of a run that was stopped by Ctrl-C or SIGTERM."""


def launch_process(words: Sequence[str], folder: Path) -> int:
    """Run the harness as a process of its own; what it prints goes to ``console.log`` in its folder."""
    folder.mkdir(parents=True)
    command = [sys.executable, str(PACKAGE / "run.py"), *words, f"hydra.run.dir={quoted(folder)}"]
    with (folder / LOG).open("w", encoding="utf-8") as log:
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            return child.wait()
        except BaseException:
            child.send_signal(signal.SIGINT)
            try:
                child.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            raise


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
