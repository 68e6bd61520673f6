"""What holds for the values of every field, whatever it means: checked in one place."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from harness.config.problems import unknown

SEEDS = (0, 2**64 - 1)
WHOLE = (-(2**63), 2**63 - 1)
FLOAT32 = (2 - 2**-23) * 2.0**127
"""The largest number that tensors hold; torch raises an error for a larger one."""
AT_ONCE = max(64, os.cpu_count() or 1)
"""The most threads or processes on one machine: more than its cores gain nothing, and very many crash it."""


def value_problems(value: Any, path: str = "") -> Iterator[str]:
    """Each field of a config (a dataclass, with dataclasses, mappings and lists below) that no field may be so.

    A name that is not a field; a number that is infinite, NaN or beyond float32; a whole number beyond 64 bits.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [item.name for item in dataclasses.fields(value)]
        for name, one in vars(value).items():
            if name in names or name.startswith("_"):
                yield from value_problems(one, _below(path, name))
            else:
                yield f"{_below(path, name)}: {unknown('field', name, names)}"
    elif isinstance(value, dict):
        for name, one in value.items():
            yield from value_problems(one, _below(path, str(name)))
    elif isinstance(value, list):
        for index, one in enumerate(value):
            yield from value_problems(one, f"{path}[{index}]")
    elif isinstance(value, float) and not abs(value) <= FLOAT32:
        yield f"{path}={value}: must be " + (f"at most {FLOAT32:.3g}" if math.isfinite(value) else "a finite number")
    elif isinstance(value, int):
        low, high = SEEDS if path.rpartition(".")[2] == "seed" else WHOLE
        if not low <= value <= high:
            shown = str(value) if abs(value) < 10**30 else "a very long number"
            yield f"{path}={shown}: must be {low} to {high}"


def at_once(name: str, value: int | None, least: int = 1, null: str = "") -> Iterator[str]:
    """Whether ``value`` threads or processes can be started here."""
    if value is not None and not least <= value <= AT_ONCE:
        yield f"{name}={value}: must be at least {least} and, on this machine, at most {AT_ONCE}{null}"


def _below(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def unknown_keys(node: DictConfig, path: str) -> Iterator[str]:
    """Keys of a composed config, nothing in it resolved, that its types do not have."""
    kind = OmegaConf.get_type(node)
    names = [item.name for item in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else None
    for name in map(str, node):
        if names is not None and name not in names:
            yield f"{path}.{name}: {unknown('field', name, names)}"
        child = node._get_node(name)
        if isinstance(child, DictConfig) and not (child._is_none() or child._is_interpolation() or child._is_missing()):
            yield from unknown_keys(child, f"{path}.{name}")
