"""Calibrated weights kept from run to run, found by all that went into them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from harness.files.locks import lock
from harness.files.tensors import check_header, read_safetensors, write_tensors
from harness.files.text import FileError, check_file
from harness.formats.mx import BLOCK, MXBlocks
from harness.mx.linears.base import LinearFormat, MXWeight
from harness.report.codec import decode, read

log = logging.getLogger(__name__)

ROOMS = ("calib", "formats", "kv", "models", "mx", "rollout")
"""Rooms of this package whose code decides what a calibration gives."""

SLACK_BYTES = 1 << 20
"""A stored calibration's header is no larger."""


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


class StaleError(ValueError):
    """A stored calibration that is damaged, or not what its name says."""


def fingerprint(model: nn.Module, clips: Sequence[Tensor], **settings: Any) -> str:
    """SHA-256 of all that decides a calibration: the model's weights, clips, settings, this code, torch's version."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        _add(digest, name, tensor)
    for index, tensor in enumerate(clips):
        _add(digest, str(index), tensor)
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    digest.update(torch.__version__.encode())
    package = Path(__file__).resolve().parents[1]
    for room in ROOMS:
        for file in sorted((package / room).rglob("*.py")):
            digest.update(str(file.relative_to(package)).encode() + file.read_bytes())
    return digest.hexdigest()


def _add(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())


def _content(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        _add(digest, name, tensors[name])
    return digest.hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait until no other process is at ``path``: of several that want one calibration, one makes it.

    Raises:
        OSError: if its folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as file:
        if (unlocked := lock(file.fileno(), wait=True)) is not None:
            log.warning("%s: no lock here (%s); runs side by side may calibrate the same weights", path, unlocked)
        yield


def save(path: Path, weights: Mapping[str, MXWeight], facts: Facts) -> None:
    """Write weights and how they came about to ``path``, all or nothing.

    Raises:
        OSError: if it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for name, weight in weights.items():
        parts = {"elements": weight.blocks.elements, "scales": weight.blocks.scales, "bias": weight.bias}
        tensors |= {f"{name}.{part}": x.cpu().contiguous() for part, x in parts.items() if x is not None}
    metadata = {"facts": json.dumps(asdict(facts)), "content": _content(tensors), "fingerprint": path.stem}
    write_tensors(path, tensors, metadata)


def load(path: Path, model: nn.Module, formats: Mapping[str, LinearFormat]) -> tuple[dict[str, MXWeight], Facts]:
    """Weights for the Linears ``formats`` of ``model``, on their device, and how they came about.

    Raises:
        StaleError: if the file is damaged, or holds anything but what was stored under its name.
    """
    expected = {
        name: tensor
        for path_, fmt in formats.items()
        for name, tensor in _expected(path_, model.get_submodule(path_), fmt).items()
    }
    try:
        check_file(path, "a stored calibration", sum(tensor.nbytes for tensor in expected.values()) + SLACK_BYTES)
        check_header(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        tensors = read_safetensors(path)
        facts = read(Facts, decode(metadata["facts"]))
    except (FileError, OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise StaleError(f"{path}: {error}") from error
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    if shapes != {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in expected.items()}:
        raise StaleError(f"{path}: its tensors are not those of this model's Linears")
    if metadata.get("fingerprint") != path.stem or metadata.get("content") != _content(tensors):
        raise StaleError(f"{path}: its content is not what was stored")
    device = next(model.parameters()).device
    weights = {}
    for name, fmt in formats.items():
        elements, scales, bias = (tensors.get(f"{name}.{part}") for part in ("elements", "scales", "bias"))
        assert elements is not None
        assert scales is not None
        blocks = MXBlocks(elements.to(device), scales.to(device))
        weights[name] = MXWeight(blocks, None if bias is None else bias.to(device), fmt)
    return weights, facts


def _expected(name: str, linear: nn.Module, fmt: LinearFormat) -> dict[str, Tensor]:
    """What is stored for a Linear, on the meta device."""
    assert isinstance(linear, nn.Linear)
    outputs, inputs = linear.weight.shape
    shapes = {"elements": (outputs, inputs * fmt.element.bits // 8), "scales": (outputs, inputs // BLOCK)}
    found = {f"{name}.{part}": torch.empty(shape, dtype=torch.uint8, device="meta") for part, shape in shapes.items()}
    if linear.bias is not None:
        found[f"{name}.bias"] = torch.empty(outputs, dtype=linear.bias.dtype, device="meta")
    return found
