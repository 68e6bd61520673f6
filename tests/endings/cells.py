"""What stays when a run ends early: the command a user types, in a process of its own, hit at one point by one thing.

python tests/endings/cells.py [--only plain] [--out table.md]     (all: some three hours on a busy core)

Each cell starts a run, has the fault happen, looks at what is there, starts the same command with resume=true and
compares every figure with those of a run that nothing happened to. The table goes to standard output.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

from harness.report.files import JOURNAL, PAGE, RECORD  # noqa: E402
from harness.report.journal import load_run, read_journals  # noqa: E402
from harness.report.record import load_record  # noqa: E402

CLIPS = 4
SMOKE = ["model=smoke", "model.arch.n_layers=2", f"data.synthetic_clips={CLIPS}", "data.limit=null"]
SMOKE += ["data.future_frames=3", "measure.parts_frames=0"]
MX = ["quant=mxfp8_mlp", "kv=mx_v_only"]
SWEEP = ["-m", "quant=mxfp8_mlp,mxfp4_mlp", "kv=mx_v_only"]
HIT_JOB = "1_"
HIT_RUN = "2_MXFP8_MLP"
"""Of a ladder, the run that is hit."""

KINDS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGKILL", "disk full", "reader left", "/dev/full", ">&-")
POINTS = ("setup", "first clip", "middle", "video", "record", "page")
WAYS = ("plain", "ddp", "sweep", "ladder")
NEVER = (("ladder", "video"),)
"""Where nothing can happen: a ladder's runs on a CPU write no videos."""
CODES = {"SIGTERM": 143, "SIGINT": 130, "SIGHUP": 129, "SIGKILL": -9}
DISK = "16m"
Start = Callable[[list[str]], tuple[int, str]]
"""Runs a command to its end; gives its exit code and what it said on standard error."""


@dataclass
class Outcome:
    """What a cell gave: exit codes, the clips that were kept, the names of what is there, what was wrong."""

    way: str
    kind: str
    point: str
    code: int = 0
    kept: int = 0
    status: str = ""
    said: str = ""
    again: int = 0
    wrong: list[str] = field(default_factory=list)


def command(way: str, folder: Path, resume: bool, more: Sequence[str] = ()) -> list[str]:
    """What a user types, ``more`` words of it; the same again with ``resume=true`` goes on."""
    run = [sys.executable, str(REPO / "harness" / "run.py"), *SMOKE, *more]
    again = ["resume=true"] if resume else []
    if way == "plain":
        return [*run, *MX, f"hydra.run.dir={folder}", *again]
    if way == "ddp":
        return [*run, *MX, "trainer=ddp_cpu", f"hydra.run.dir={folder}", *again]
    if way == "sweep":
        return [*run, *SWEEP, f"hydra.sweep.dir={folder}", *again]
    # In more layers a quantised cache is smaller than BF16's: its step is not narrowed, which is three runs less.
    words = [word.replace("n_layers=2", "n_layers=6") for word in SMOKE]
    # Its runs in a process each: of several processes, runs have cells of their own.
    return [sys.executable, str(REPO / "scripts" / "ladder.py"), "--out", str(folder), *words, "trainer.devices=1"]


def fault(way: str, kind: str, point: str, once: Path, disk: Path) -> dict[str, Any]:
    """For ``fault/sitecustomize.py``."""
    batch = {"first clip": 0, "middle": 1 if way == "ddp" else 2, "video": 1 if way == "ddp" else 2}.get(point, 0)
    where = {"sweep": "", "ladder": HIT_RUN}.get(way, "")
    found: dict[str, Any] = {
        "kind": kind,
        "point": "frame" if point in ("first clip", "middle") else point,
        "batch": batch,
    }
    found |= {"once": str(once), "where": where, "fill": str(disk / "filler")}
    if (way, point) == ("ddp", "middle"):  # of both: neither is nearer to its end on a busy machine
        found["other"] = str(disk / "run" / JOURNAL / "1.jsonl")
    return found | {"parent": way == "ladder", "rank": 0}


@contextmanager
def small_disk(small: bool) -> Iterator[Path]:
    """A folder; ``small``: on a file system of its own of :data:`DISK` bytes, which takes root."""
    folder = Path(tempfile.mkdtemp())
    try:
        if small:
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)], check=True)
        yield folder
    finally:
        if small:
            subprocess.run(["umount", "-l", str(folder)], check=True)
        shutil.rmtree(folder, ignore_errors=True)


def as_in_a_terminal() -> None:
    """Signals as a terminal's commands have them: a shell's background ignores SIGINT, and nohup SIGHUP."""
    for name in (signal.SIGINT, signal.SIGHUP):
        signal.signal(name, signal.SIG_DFL)


def start(words: Sequence[str], kind: str = "", told: dict[str, Any] | None = None) -> tuple[int, str]:
    """Exit code and what was said on standard error, in a session of its own as in a terminal."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent / "fault"), "OMP_NUM_THREADS": "1"}
    if told is not None:
        env["HARNESS_FAULT"] = json.dumps(told)
    shell = ["sh", "-c", 'exec "$@" >&-', "sh", *words] if kind == ">&-" else list(words)
    done = subprocess.run(
        shell,
        env=env,
        cwd=tempfile.gettempdir(),
        capture_output=True,
        text=True,
        timeout=300,
        start_new_session=True,
        preexec_fn=as_in_a_terminal,
        check=False,
    )
    return done.returncode, done.stderr


def figures(way: str, folder: Path) -> Any:
    """Everything that must not depend on how often a run was broken off."""
    if way == "ladder":
        state = json.loads((folder / "ladder.json").read_text())
        names = ("name", "verdict", "reason", "drop", "added", "interval", "bytes", "fidelity", "words")
        return [{name: trial[name] for name in names} for trial in state["trials"]], state["recommendation"]
    if way == "sweep":
        return {job.name: figures("plain", job) for job in sorted(folder.glob("[0-9]*"))}
    record = asdict(load_record(folder / RECORD))
    rows = [line.split(",") for line in (folder / "frames.csv").read_text().splitlines()]
    arms = {name: {"kv": arm["kv_stats"], "numerics": arm["numerics"]} for name, arm in record["arms"].items()}
    videos = {name: file for name, file in record["files"].items() if name.endswith(".mp4")}
    kept = {name: record[name] for name in ("status", "clips", "quality", "drift", "incidents", "fallbacks")}
    return kept | {"rows": [row[:4] + row[7:] for row in rows], "arms": arms, "videos": videos}


def hit_folder(way: str, folder: Path) -> Path:
    """Of the run that is hit."""
    if way == "sweep":
        return next(iter(sorted(folder.glob("0_*"))), folder / "none")
    return folder / "runs" / f"{HIT_RUN}.1" if way == "ladder" else folder


def look(cell: Outcome, folder: Path) -> None:
    """What the run that was hit left."""
    if not folder.is_dir():
        cell.status = "no folder"
        return
    if (folder / RECORD).is_file():
        record = load_run(folder)
        cell.status, cell.kept = record.status, len(record.clips)
    elif (folder / JOURNAL).is_dir():
        cell.status, cell.kept = "journal", sum(len(batch.clips) for batch in read_journals(folder)[1])
    else:
        cell.status = "nothing"
    if (folder / PAGE).is_file():
        cell.status += ", page"
    litter = [path.name for path in folder.rglob(".*") if path.is_file() and path.name != ".part"]
    if litter and cell.kind != "SIGKILL":
        cell.wrong.append(f"litter: {litter}")


def expected_code(cell: Outcome) -> tuple[int, ...]:
    """Exit codes that are right."""
    if cell.kind in CODES:
        return (CODES[cell.kind],)
    if cell.kind == "disk full":
        return (2,) if cell.way != "ladder" else (1, 2)
    return (0,)


def measure(way: str, kind: str, point: str, reference: Any, go_on: Start = start, more: Sequence[str] = ()) -> Outcome:
    """One cell. ``go_on`` starts the command that resumes, ``more`` are further words of both commands."""
    cell = Outcome(way, kind, point)
    with small_disk(kind == "disk full") as disk, tempfile.TemporaryDirectory() as other:
        folder, once = disk / "run", Path(other) / "once"
        told = fault(way, kind, point, once, disk)
        if kind == ">&-":
            told["point"] = "never"
        cell.code, said = start(command(way, folder, False, more), kind, told)
        cell.said = next((line for line in said.splitlines()[::-1] if line.strip()), "")[:200]
        if kind != ">&-" and not once.exists():
            cell.wrong.append("never hit")
        if "Traceback" in said:
            cell.wrong.append("traceback")
        if cell.code not in expected_code(cell):
            cell.wrong.append(f"exit code {cell.code}: {cell.said}")
        (disk / "filler").unlink(missing_ok=True)
        look(cell, hit_folder(way, folder))
        cell.again, said = go_on(command(way, folder, True, more))
        if cell.again != 0:
            cell.wrong.append(f"resume ended with {cell.again}: {said.strip()[-300:]}")
        elif figures(way, folder) != reference:
            cell.wrong.append("other figures after resume")
        elif way != "ladder" and not (hit_folder(way, folder) / PAGE).is_file():
            cell.wrong.append("no page after resume")
        litter = [str(path.relative_to(folder)) for path in folder.rglob(".*.*") if path.is_file()]
        if litter:
            cell.wrong.append(f"litter after resume: {litter}")
    return cell


def undisturbed(way: str, begin: Start = start) -> Any:
    """The figures of a run that nothing happens to; ``begin`` starts it."""
    with tempfile.TemporaryDirectory() as folder:
        code, said = begin(command(way, Path(folder) / "run", False))
        assert code == 0, said
        return figures(way, Path(folder) / "run")


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", default=WAYS)
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--points", nargs="+", default=POINTS)
    args = parser.parse_args()
    for way in args.ways:
        reference = undisturbed(way)
        for kind in args.kinds:
            for point in args.points if kind != ">&-" else ["from the start"]:
                if (way, point) in NEVER:
                    continue
                cell = measure(way, kind, point, reference)
                print(json.dumps(asdict(cell)), flush=True)


if __name__ == "__main__":
    main()
