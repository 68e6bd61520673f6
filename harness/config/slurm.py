"""Whether the tasks that SLURM started are the processes that the run is to have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

INTERACTIVE = ("bash", "interactive")
"""Names of jobs in which Lightning starts the processes itself, whatever SLURM says."""

READ = ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")
"""Numbers that Lightning reads."""


def slurm_problems(devices: int, num_nodes: int, environ: Mapping[str, str]) -> Iterator[str]:
    """What to change, if it started another number; Lightning would advise flags that start even more.

    Args:
        devices: ``trainer.devices``. num_nodes: ``trainer.num_nodes``. environ: the environment.
    """
    numbers = {name: environ[name] for name in READ if name in environ}
    if wrong := [f"{name}={text:.24}" for name, text in numbers.items() if not (text.isascii() and text.isdigit())]:
        yield f"{', '.join(wrong)}: no number, as SLURM sets it; unset it, or start the run through srun"
        return
    asked, processes = environ.get("SLURM_NTASKS", ""), devices * num_nodes
    if not asked.isdigit() or environ.get("SLURM_JOB_NAME") in INTERACTIVE:
        return
    tasks = int(asked)
    if tasks != processes:
        each = f"{tasks // num_nodes} trainer.num_nodes={num_nodes}" if num_nodes > 1 else f"{tasks}"
        yield (
            f"SLURM started {tasks} tasks (SLURM_NTASKS), and trainer.devices={devices} "
            f"trainer.num_nodes={num_nodes} are {processes}: ask SLURM for --ntasks-per-node={devices}"
            + (f", or share the clips out among {tasks} processes: trainer=ddp trainer.devices={each}" * (tasks > 1))
        )
    elif tasks > 1 and "SLURM_NTASKS_PER_NODE" not in environ:
        yield f"SLURM was asked for --ntasks={tasks}: ask for --ntasks-per-node={devices} instead"
