"""Running from Python: a composed config in, the record and the page out."""

from __future__ import annotations

import base64
import html
import io
from datetime import datetime
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from harness.ab.context import RunContext
from harness.ab.job import execute
from harness.config.compose import choices_of, in_folder
from harness.report.record import RunRecord
from harness.report.table import WIDTH, build


class RunResult:
    """What a run left.

    Attributes:
        record: everything that was measured, see docs/record.md.
        folder: with ``record.json``, ``report.html``, ``table.txt``, ``frames.csv`` and videos.

    A notebook shows its table and its page; ``print`` its table.
    """

    def __init__(self, record: RunRecord, folder: Path) -> None:
        self.record, self.folder = record, folder

    @property
    def verdict(self) -> str | None:
        """The gates' verdict; ``None`` if nothing was judged."""
        return None if self.record.gates is None else self.record.gates.verdict

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=WIDTH).print(build(self.record))
        return text.getvalue()

    def _repr_html_(self) -> str:
        page = (self.folder / "report.html").read_bytes()
        source = f"data:text/html;base64,{base64.b64encode(page).decode()}"
        frame = f'<iframe src="{source}" style="width:100%;height:900px;border:0"></iframe>'
        return f"<pre>{html.escape(str(self))}</pre>{frame}"


def run(cfg: DictConfig, folder: str | Path | None = None) -> RunResult:
    """Run a config that :func:`harness.compose` made, or Hydra's own ``compose``.

    Args:
        cfg: the config; it may have been changed since.
        folder: for the outputs; by default a new one under ``outputs/``, named after the time.

    Raises:
        ValueError: for anything a user can put right.
        harness.measure.stability.InstabilityError: if an arm became unstable; finished clips stay recorded.
        OSError: naming what could not be written.
    """
    choices = choices_of(cfg)
    names = [
        datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f"),
        *(choices.get(group, "") for group in ("model", "quant", "kv")),
    ]
    there = Path(folder or Path("outputs") / "_".join(filter(None, names))).absolute()
    with in_folder(cfg, there) as hydra:
        there.mkdir(parents=True, exist_ok=True)
        record = execute(cfg, RunContext(folder=there, overrides=list(hydra.overrides.task), choices=choices))
    assert record is not None  # this process is the first one of the run
    return RunResult(record, there)
