"""What becomes of a record: saved, judged, put on paper and on the screen, each whatever happens to the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from harness.config import RunConf
from harness.files.writing import write_text
from harness.report import incidents
from harness.report.gates import evaluate
from harness.report.page.run_page import write_page
from harness.report.record import RunRecord, save_record
from harness.report.table import WIDTH, build, render


def conclude(record: RunRecord, conf: RunConf, baseline: RunRecord | None, folder: Path) -> list[Exception]:
    """Save the record, judge it, write what is made from it and show its table.

    Saved before it is judged, and every step is tried: neither a gate that cannot be evaluated nor a full disk nor a
    page that cannot be drawn takes anything else of a finished run with it. Of a record that is there already it makes
    up for what is missing, since its run may have been killed on the way.

    Returns:
        What went wrong, in order.
    """

    def judge() -> None:
        if record.gates is None and conf.gates.enabled and not (conf.gates.implied and len(record.arms) < 2):
            record.gates = evaluate(record, conf.gates, baseline)
            save_record(record, folder / "record.json")

    def log_incidents() -> None:
        if conf.stability.incident_log:
            incidents.append(Path(conf.stability.incident_log), record)

    steps: list[Callable[[], Any]] = [
        lambda: save_record(record, folder / "record.json"),
        judge,
        lambda: write_text(folder / "table.txt", render(record)),
        log_incidents,
        lambda: write_page(record, folder),
        lambda: show(record, folder),
    ]
    problems = []
    for step in steps:
        try:
            step()
        except Exception as problem:
            problems.append(problem)
    return problems


def show(record: RunRecord, folder: Path) -> None:
    """Print the table, and where everything is."""
    console = Console()
    console.width = max(console.width, WIDTH)
    console.print(build(record), crop=False)
    print(f"Record, table, report.html and videos: {folder}")
