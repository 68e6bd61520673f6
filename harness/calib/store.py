"""Calibrated weights kept from run to run, found by all that went into them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.files import kept
from harness.files.digest import Digest
from harness.files.kept import Shapes, StaleError
from harness.formats.mx import BLOCK, MXBlocks
from harness.mx.linears.base import LinearFormat, MXWeight
from harness.report.codec import decode, read

ROOMS = ("calib", "formats", "kv", "models", "mx", "rollout")
"""Rooms of this package whose code decides what a calibration gives."""


@dataclass(frozen=True)
class Facts:
    """How weights came about; bytes are the allocator's peak on a GPU, the process's resident peak on a CPU."""

    method: str
    clips: list[str]
    frames: int
    seconds: float
    peak_bytes: int
    device: str
    linears: int


def fingerprint(model: nn.Module, clips: Sequence[Tensor], **settings: Any) -> str:
    """SHA-256 of all that decides a calibration: the model's weights, clips, settings, this code, torch's version."""
    digest = Digest().tensors(model.state_dict()).tensors({str(index): clip for index, clip in enumerate(clips)})
    return digest.settings(torch=torch.__version__, **settings).code(ROOMS).hex()


def save(path: Path, weights: Mapping[str, MXWeight], facts: Facts) -> None:
    """Write weights and how they came about to ``path``, all or nothing.

    Raises:
        OSError: if it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for name, weight in weights.items():
        parts = {"elements": weight.blocks.elements, "scales": weight.blocks.scales, "bias": weight.bias}
        tensors |= {f"{name}.{part}": x for part, x in parts.items() if x is not None}
    kept.keep(path, tensors, json.dumps(asdict(facts)))


def load(path: Path, model: nn.Module, formats: Mapping[str, LinearFormat]) -> tuple[dict[str, MXWeight], Facts]:
    """Weights for the Linears ``formats`` of ``model``, on their device, and how they came about.

    Raises:
        StaleError: if the file is damaged, or holds anything but what was stored under its name.
    """
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, fmt in formats.items():
        shapes |= _shapes(name, model.get_submodule(name), fmt)
    tensors, said = kept.read(path, shapes)
    try:
        facts = read(Facts, decode(said))
    except ValueError as error:
        raise StaleError(f"{path}: {error}") from error
    device = next(model.parameters()).device
    weights = {}
    for name, fmt in formats.items():
        elements, scales, bias = (tensors.get(f"{name}.{part}") for part in ("elements", "scales", "bias"))
        assert elements is not None
        assert scales is not None
        blocks = MXBlocks(elements.to(device), scales.to(device))
        weights[name] = MXWeight(blocks, None if bias is None else bias.to(device), fmt)
    return weights, facts


def _shapes(name: str, linear: nn.Module, fmt: LinearFormat) -> Shapes:
    """What is stored for a Linear."""
    assert isinstance(linear, nn.Linear)
    outputs, inputs = linear.weight.shape
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        f"{name}.elements": ((outputs, inputs * fmt.element.bits // 8), torch.uint8),
        f"{name}.scales": ((outputs, inputs // BLOCK), torch.uint8),
    }
    if linear.bias is not None:
        found[f"{name}.bias"] = ((outputs,), linear.bias.dtype)
    return found
