"""Roll clips out in BF16 and in the candidate formats, and report what it cost and what it gained.

python harness/run.py quant=mxfp8_all kv=mx_v_only
python harness/run.py -m quant=bf16,mxfp8_all,mxfp4_mlp kv=bf16,mx_v_only data.limit=2
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    # Started as a file, Python looks for modules beside it first, where our rooms would pass for top-level packages.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from harness.start import hush, require

    hush()
    require()

import hydra
from hydra.errors import CompactHydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from harness import __version__
from harness.config import CONF, ConfigError, reference
from harness.config.command import UserError, check_command, in_hydras_order, read_command
from harness.config.compose import one_line
from harness.config.help import run_help
from harness.imports import import_lightning
from harness.kernels.cache import place_compilers
from harness.signals import Signals, Stopped
from harness.streams import complain, patient_streams

if TYPE_CHECKING:
    from harness.api import RunResult

AFTER_BREAK = (
    "Each job's folder keeps what it had finished (record.json, videos, frames.csv); the sweep's report.html shows "
    "which jobs those are. Run the others again."
)


def run(cfg: DictConfig) -> str | None:
    """See :func:`harness.job.run`."""
    return _job().run(cfg)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="run")
def main(cfg: DictConfig) -> None:
    """One job of Hydra's."""
    _job().one_of_hydras(cfg)


def _job() -> Any:
    """What computes: it imports torch and Lightning, so not before what was typed is known to be right."""
    import_lightning()
    return importlib.import_module("harness.job")


def cli() -> None:
    """The command.

    Exit code 0: done, and with gates: ship; 1: the run broke; 2: something in the command, config or files is wrong;
    3: do not ship; 4: undecided; 130: Ctrl-C; 143: SIGTERM; 129: SIGHUP. A sweep's verdicts are in its records: it
    ends with 0 if its runs ran.
    """
    with patient_streams():
        asked = sys.argv[1:]
        if "--version" in asked:
            print(f"mx-world {__version__}")
        elif "--fields" in asked:
            sys.argv.remove("--fields")
            sys.exit(reference.main())
        else:
            _compose_and_run(asked)


def _compose_and_run(asked: list[str]) -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra's errors come here, where they get one line
    place_compilers()
    try:
        command = read_command(asked)
        if command.helps:
            print(run_help(command.config_dir))
            return
        if command.composes:
            check_command(command)
            sys.argv[1:] = in_hydras_order(asked, command)
        if command.runs:
            _run_jobs()
        else:
            main()
    except (ConfigError, CompactHydraException, OmegaConfBaseException, OSError) as error:
        plain = isinstance(error, ConfigError | UserError)
        complain(error if plain else one_line(error))
        sys.exit(2)
    except Exception as error:
        if {"-m", "--multirun"} & set(asked):
            complain(f"the sweep broke off: {error}", [AFTER_BREAK])
        raise


def _run_jobs() -> None:
    job = _job()  # before signals are caught: modules that are half loaded could not be
    try:
        with Signals():
            main()
    except Stopped as stop:
        notes = getattr(stop, "__notes__", [])  # what went wrong on the way out
        if job.is_first_process():  # others end with the first process, which says so
            print(f"stopped by {stop.signal.name}", *(f"and: {note}" for note in notes), sep="\n", file=sys.stderr)
        sys.exit(stop.exit_code)


class _CallableModule(ModuleType):
    """So that ``harness.run(cfg)`` runs a config, though ``harness.run`` is this module."""

    def __call__(self, cfg: DictConfig, folder: str | Path | None = None) -> RunResult:
        """See :func:`harness.api.run`."""
        from harness.api import run as run_config

        return run_config(cfg, folder)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    cli()
