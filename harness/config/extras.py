"""What needs a package that the harness itself does not, and which extra brings it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Extra:
    """An optional choice: the extra of this project that brings it, and the module that must then be there."""

    name: str
    module: str


LOGGERS = {
    "TensorBoardLogger": Extra("tensorboard", "tensorboard"),
    "MLFlowLogger": Extra("mlflow", "mlflow"),
    "WandbLogger": Extra("wandb", "wandb"),
}
"""By the class of the logger."""

LAUNCHERS = {
    "joblib": Extra("sweeps", "hydra_plugins.hydra_joblib_launcher"),
    "submitit_local": Extra("sweeps", "hydra_plugins.hydra_submitit_launcher"),
    "submitit_slurm": Extra("sweeps", "hydra_plugins.hydra_submitit_launcher"),
    "ray": Extra("ray", "hydra_plugins.hydra_ray_launcher"),
}
"""By the option of ``sweep=`` and of ``hydra/launcher=``."""


def missing_logger(target: str) -> str | None:
    """What to install before ``target``, the class of a logger, can be used; ``None`` if nothing."""
    return _missing(LOGGERS.get(target.rpartition(".")[2]), f"logger {target}")


def missing_launcher(words: Sequence[str]) -> str | None:
    """The same for the launcher that the command line's ``words`` choose.

    Hydra itself would only say that it knows no such launcher.
    """
    for word in words:
        group, _, option = word.lstrip("+").partition("=")
        if group in ("sweep", "hydra/launcher") and (problem := _missing(LAUNCHERS.get(option), word)) is not None:
            return problem
    return None


def _missing(extra: Extra | None, what: str) -> str | None:
    if extra is None or _installed(extra.module):
        return None
    return (
        f"{what}: {extra.module} is not installed; install the extra [{extra.name}], "
        f"such as pip install -e '.[{extra.name}]'"
    )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that would hold it is missing too
        return False
