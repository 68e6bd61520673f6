"""Loaded by every Python process of a run under test: has something happen to it at one point of the run.

``HARNESS_FAULT`` is JSON: ``point``, ``kind``, and of the process that is hit ``rank``, ``batch`` and
words that its command line must have (``where``). ``once`` is a file that the first process to get there makes: it
happens to that one alone. ``other`` is the journal of another process, which has finished a clip when it happens.
"""

import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import time

FAULT = json.loads(os.environ.get("HARNESS_FAULT", "{}"))
MODULE = "harness.ab.module"


def mine():
    """Whether this is the process that is to be hit, for the first time."""
    if int(os.environ.get("LOCAL_RANK", "0")) != FAULT.get("rank", 0) or FAULT.get("where", "") not in " ".join(
        sys.argv
    ):
        return False
    try:
        os.close(os.open(FAULT["once"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def happen():
    if not mine():
        return
    wait_for(FAULT.get("other"))
    kind = FAULT["kind"]
    if kind in ("SIGTERM", "SIGKILL"):  # of one process: `kill`, a container's end, the out-of-memory killer
        os.kill(os.getppid() if FAULT.get("parent") else os.getpid(), signal.Signals[kind])
    elif kind in ("SIGINT", "SIGHUP"):  # of all in the terminal
        os.killpg(0, signal.Signals[kind])
    elif kind == "disk full":
        fill(FAULT["fill"])
    elif kind == "reader left":
        read, write = os.pipe()
        os.dup2(write, 1)
        os.close(write)
        os.close(read)
    elif kind == "/dev/full":
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, 1)
        os.close(full)


def wait_for(journal, seconds=120):
    end = time.monotonic() + seconds
    while journal and time.monotonic() < end and not (os.path.exists(journal) and os.path.getsize(journal)):
        time.sleep(0.05)


def fill(path):
    """Write to ``path`` until nothing more fits: large pieces first, then bytes."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    for size in (1 << 20, 1 << 12, 1):
        try:
            while True:
                os.write(file, b"\0" * size)
        except OSError:
            pass
    os.close(file)


def content_of(path):
    with open(path, "rb") as file:
        return file.read()


class Hook(importlib.abc.MetaPathFinder):
    """Changes the module once it is loaded."""

    def find_spec(self, name, path, target=None):
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        plain = spec.loader.exec_module

        def exec_module(module):
            plain(module)
            install(module.RolloutModule)

        spec.loader.exec_module = exec_module
        return spec


def install(kind):
    setup, step = kind.setup, kind.predict_step
    seen = {"batch": None}

    def watched_setup(self, stage):
        if FAULT["point"] == "setup":
            happen()
        return setup(self, stage)

    def watched_step(self, batch, batch_idx):
        seen["batch"] = batch_idx
        plain = self.on_frame

        def on_frame():
            plain()
            if FAULT["point"] == "frame" and batch_idx == FAULT["batch"]:
                happen()

        self.on_frame = on_frame
        try:
            return step(self, batch, batch_idx)
        finally:
            self.on_frame = plain

    kind.setup, kind.predict_step = watched_setup, watched_step
    replace = os.replace

    def watched_replace(source, target, **options):
        """At the moment when a file is about to take its place."""
        name, point = os.path.basename(target), FAULT["point"]
        over = name == "record.json" and b'"status": "running"' not in content_of(source)
        if (
            (point == "video" and name.endswith(".mp4") and seen["batch"] == FAULT["batch"])
            or (point == "record" and over)
            or (point == "page" and name == "report.html")
        ):
            content = content_of(source)
            if FAULT["kind"] == "disk full":  # it fills while the file is written
                os.truncate(source, 0)
            happen()
            if FAULT["kind"] == "disk full":
                with open(source, "wb") as file:
                    file.write(content)
        return replace(source, target, **options)

    os.replace = watched_replace


if FAULT:
    sys.meta_path.insert(0, Hook())
