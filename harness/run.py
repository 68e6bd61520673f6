"""Roll clips out in BF16 and in the candidate formats, and report what it cost and what it gained.

python harness/run.py quant=mxfp8_all kv=mx_v_only
python harness/run.py -m quant=bf16,mxfp8_all,mxfp4_mlp kv=bf16,mx_v_only data.limit=2
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if __name__ == "__main__":
    # Started as a file, Python looks for modules beside it first, where our rooms would pass for top-level packages.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from harness.imports import import_torchmetrics  # (how threads wait is settled before torch is imported)
    from harness.start import hush, require

    hush()
    require()
    import_torchmetrics()

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from harness import __version__
from harness.ab.context import RunContext
from harness.ab.job import execute
from harness.ab.processes import ProcessError
from harness.config import CONF, ConfigError, reference
from harness.config.command import check_command, in_hydras_order, read_command
from harness.config.compose import one_line
from harness.kernels.cache import place_compilers
from harness.measure.stability import InstabilityError
from harness.report.gates import EXIT_CODES
from harness.signals import Signals, Stopped
from harness.streams import patient_streams

if TYPE_CHECKING:
    from harness.api import RunResult

AFTER_BREAK = (
    "Each job's folder keeps what it had finished (record.json, videos, frames.csv); the sweep's report.html shows "
    "which jobs those are. Run the others again."
)


class UserError(CompactHydraException):
    """An error that the user can put right: shown as it is, without a traceback."""


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


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="run")
def main(cfg: DictConfig) -> None:
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
        print(f"{who}error: {error}", *(f"and: {note}" for note in notes), sep="\n", file=sys.stderr)
        sys.exit(1 if isinstance(error, InstabilityError | ProcessError) else 2)
    finally:
        # A sweep runs its jobs in one process: hand back what this one held.
        gc.collect()
        torch.cuda.empty_cache()


def cli() -> None:
    """The command.

    Exit code 0: done, and with gates: ship; 1: the run broke; 2: something in the command, config or files is wrong;
    3: do not ship; 4: undecided; 130: Ctrl-C; 143: SIGTERM; 129: SIGHUP. A sweep's verdicts are in its records: it
    ends with 0 if its runs ran.
    """
    with patient_streams():
        try:
            with Signals():
                _command()
        except Stopped as stop:
            notes = getattr(stop, "__notes__", [])  # what went wrong on the way out
            if not getattr(rank_zero_only, "rank", 0):  # others end with the first process, which says so
                print(f"stopped by {stop.signal.name}", *(f"and: {note}" for note in notes), sep="\n", file=sys.stderr)
            sys.exit(stop.exit_code)


def _command() -> None:
    asked = sys.argv[1:]
    if "--version" in asked:
        print(f"mx-world {__version__}")
        return
    if "--fields" in asked:
        sys.argv.remove("--fields")
        sys.exit(reference.main())
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra's errors come here, where they get one line
    place_compilers()
    try:
        command = read_command(asked)
        if command.composes:
            check_command(command)
            sys.argv[1:] = in_hydras_order(asked, command)
        main()
    except (ConfigError, CompactHydraException, OmegaConfBaseException, OSError) as error:
        plain = isinstance(error, ConfigError | UserError)
        print(f"error: {error if plain else one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if {"-m", "--multirun"} & set(asked):
            print(f"error: the sweep broke off: {error}\n{AFTER_BREAK}", file=sys.stderr)
        raise


class _CallableModule(ModuleType):
    """So that ``harness.run(cfg)`` runs a config, though ``harness.run`` is this module."""

    def __call__(self, cfg: DictConfig, folder: str | Path | None = None) -> RunResult:
        """See :func:`harness.api.run`."""
        from harness.api import run as run_config

        return run_config(cfg, folder)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    cli()
