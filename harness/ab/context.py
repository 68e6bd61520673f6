"""Where a run's results go and what it was asked for: all that a run needs beside its composed config."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from hydra.conf import HydraConf
from hydra.types import RunMode


@dataclass(frozen=True)
class RunContext:
    """Passed with a composed config to :func:`harness.ab.job.execute`.

    Attributes:
        folder: of the run; its name is the run's.
        overrides: what was typed, for the record.
        choices: the chosen option of each config group, for the record and for the arms' labels.
        multirun: whether the run is a job of a sweep.
        command: the process's arguments, for the record.
    """

    folder: Path
    overrides: list[str] = field(default_factory=list)
    choices: dict[str, str] = field(default_factory=dict)
    multirun: bool = False
    command: list[str] = field(default_factory=lambda: list(sys.argv))

    @classmethod
    def of_hydra(cls, hydra: HydraConf) -> RunContext:
        """The context of one of Hydra's jobs."""
        choices = {str(group): str(choice) for group, choice in hydra.runtime.choices.items()}
        return cls(
            folder=Path(hydra.runtime.output_dir),
            overrides=list(hydra.overrides.task),
            choices={group: choice for group, choice in choices.items() if "hydra/" not in group},
            multirun=hydra.mode is RunMode.MULTIRUN,
        )
