"""Launch shapes that were measured, as data: a JSON file for each GPU beside the kernels that they are for.

A file names its ``gpu`` (as ``torch.cuda.get_device_name`` does), compute ``capability`` (90 for 9.0) and the
``fields`` of a config, and lists ``runs`` of a tuner, each with its ``date``, the ``commit`` it measured and the
``shapes`` it found: what identifies a product (its ``role``, where it has one), and the ``config`` that was fastest;
its last fields may be left out where they have their defaults. A later run wins over an earlier one. A GPU without a
file of its own uses those of its compute capability.
"""

import functools
import json
from importlib import resources
from typing import Any

import torch


@functools.cache
def read(package: str) -> tuple[dict[str, Any], ...]:
    """The files in folder ``tuned`` of a package, by name of the file."""
    folder = resources.files(package) / "tuned"
    if not folder.is_dir():
        return ()
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".json")), key=lambda f: f.name)
    return tuple(json.loads(file.read_text(encoding="utf-8")) for file in files)


@functools.cache
def shapes(package: str, gpu: str | None, capability: int) -> tuple[dict[str, Any], ...]:
    """Measured shapes for ``gpu``, or for all of its ``capability`` where none is its own; later ones win."""
    alike = [file for file in read(package) if file["capability"] == capability]
    own = [file for file in alike if file["gpu"] == gpu]
    return tuple(shape for file in own or alike for run in file["runs"] for shape in run["shapes"])


@functools.cache
def gpu_name(device: torch.device) -> str | None:
    """What a file for ``device`` would be of; None for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def entry(found: dict[str, Any]) -> str:
    """A line for ``shapes`` of a run, as a tuner prints it."""
    return json.dumps(found) + ","
