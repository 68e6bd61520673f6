"""One of Hydra's jobs: a run, and how it ends for who typed the command. With it comes all that computes."""

from __future__ import annotations

import gc
import sys

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from harness.ab.context import RunContext
from harness.ab.job import execute
from harness.ab.processes import ProcessError
from harness.config.command import UserError
from harness.measure.stability import InstabilityError
from harness.report.gates import EXIT_CODES
from harness.streams import shown


def run(cfg: DictConfig) -> str | None:
    """One of Hydra's jobs.

    Returns:
        The verdict of the gate that was asked for; ``None`` where none was, or it was only implied.

    Raises:
        Exception: as :func:`harness.ab.job.execute` does.
    """
    record = execute(cfg, RunContext.of_hydra(HydraConfig.get()))
    if record is None or record.gates is None:
        return None
    asked = not record.config["gates"]["implied"] or any(word.startswith("gates.") for word in record.overrides)
    return record.gates.verdict if asked else None


def one_of_hydras(cfg: DictConfig) -> None:
    """One job of Hydra's: errors that the user can put right end with their message, not a traceback."""
    try:
        verdict = run(cfg)
        if verdict is not None and HydraConfig.get().mode is not RunMode.MULTIRUN:
            sys.exit(EXIT_CODES[verdict])
    except (ValueError, OSError, InstabilityError, ProcessError) as error:
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            raise UserError(str(error)) from error  # Hydra goes on with the other jobs and ends with this
        rank = getattr(rank_zero_only, "rank", 0)
        who = f"process {rank}: " if rank else ""
        notes = getattr(error, "__notes__", [])  # what went wrong on the way out
        print(shown("\n".join([f"{who}error: {error}", *(f"and: {note}" for note in notes)])), file=sys.stderr)
        sys.exit(1 if isinstance(error, InstabilityError | ProcessError) else 2)
    finally:
        # A sweep runs its jobs in one process: hand back what this one held.
        gc.collect()
        torch.cuda.empty_cache()


def is_first_process() -> bool:
    """Whether this is the process of a run that speaks for the others."""
    return not getattr(rank_zero_only, "rank", 0)
