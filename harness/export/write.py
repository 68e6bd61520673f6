"""Writes what an arm rolled out with, bit for bit, as one safetensors file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from torch import Tensor, nn

from harness.export.layout import (
    KEY,
    ExportError,
    ExportHeader,
    digest,
    fingerprint,
    header_digest,
    in_order,
    quantization_config,
    tensors_of,
)
from harness.files.tensors import write_tensors
from harness.models.world import WorldModel
from harness.mx.linears.base import MXModule
from harness.report.codec import encode
from harness.rollout.linears import is_packed


def exported_tensors(model: WorldModel) -> dict[str, Tensor]:
    """Every weight of ``model`` as the file holds it, on the CPU, whatever its kernels have packed it into."""
    tensors: dict[str, Tensor] = {}
    for name, module in _own(model):
        if isinstance(module, MXModule):
            tensors |= tensors_of(name, module.mx_weight())
        else:
            plain = module.plain() if is_packed(module) else module
            tensors |= {f"{name}.{key}".lstrip("."): value for key, value in plain.state_dict().items()}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _own(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules whose weights are stored together, by name: MX and packed Linears whole, and every other leaf."""
    for name, module in model.named_children():
        path = f"{prefix}{name}"
        if isinstance(module, MXModule) or is_packed(module) or not list(module.children()):
            yield path, module
        else:
            yield from _own(module, f"{path}.")


def weights_fingerprint(model: WorldModel) -> str:
    """SHA-256 of ``model``'s weights in their formats: equal for what rolls out alike, however it is packed."""
    return fingerprint({name: digest(tensor) for name, tensor in exported_tensors(model).items()})


def write_export(model: WorldModel, header: ExportHeader, path: Path) -> ExportHeader:
    """Write ``model`` to ``path``, complete or not at all; the same weights and header give the same bytes.

    Returns:
        The header as written, digests and formats filled in.

    Raises:
        ExportError: if no Linear of it is MX: its own checkpoint is what to take away.
        OSError: if the file cannot be written.
    """
    formats = {name: module.fmt.element for name, module in model.named_modules() if isinstance(module, MXModule)}
    if not formats:
        raise ExportError("no Linear of this model is MX: take its own checkpoint away, and kv=… with it")
    others = [entry.path for entry in model.linears() if entry.path not in formats]
    tensors = exported_tensors(model)
    header = replace(
        header,
        quantization_config=quantization_config(formats, others),
        digests={name: digest(tensor) for name, tensor in sorted(tensors.items())},
    )
    header = replace(header, sha256=header_digest(asdict(header)))
    write_tensors(path, tensors, {KEY: encode(in_order(asdict(header)))})
    return header
