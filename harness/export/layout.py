"""What an exported checkpoint looks like: names and element types of its tensors, and what its header says.

One safetensors file. The tensors of an MX Linear ``NAME`` are named as compressed-tensors names them
(``mxfp4-pack-quantized`` and ``mxfp8-quantized``), which vLLM and llm-compressor read and write:

| tensor | element type | shape | holds |
|---|---|---|---|
| ``NAME.weight_packed`` | uint8 | [N, K/2] | E2M1 elements, two a byte, the even one in the low nibble |
| ``NAME.weight`` | float8_e4m3fn or float8_e5m2 | [N, K] | 8-bit elements |
| ``NAME.weight_scale`` | uint8 | [N, K/32] | E8M0: the scale of 32 elements along K is 2^(byte - 127); 255 is NaN |
| ``NAME.bias`` | bfloat16 | [N] | the bias, where there is one |

Every other tensor is the model's own, BF16. The header has one entry, JSON under ``mx_world_harness``: a header with
several would be written in another order each time, and the same weights are to be the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from harness.formats.mx import BLOCK, E2M1, ElementFormat, MXBlocks
from harness.mx.linears.base import MXWeight
from harness.report.codec import encode

KEY = "mx_world_harness"
"""The header's one entry."""
VERSION = 2
MAX_HEADER_BYTES = 32 * 2**20


class ExportError(ValueError):
    """A checkpoint that cannot be written or read as an exported one; the message says what is wrong and what to do."""


@dataclass(frozen=True)
class ExportHeader:
    """What an exported checkpoint says of itself.

    Attributes:
        model: fields of the model's config, see :class:`harness.models.gamerft.GameRFTConfig`.
        vae_scale: the decoder's latents are this times the model's.
        quant: fields of :class:`harness.mx.conf.MXConf`, kernel left to the machine.
        kv: fields of :class:`harness.kv.KVConf`. sampler: fields of :class:`harness.rollout.SamplerConf`.
        label: what a person calls the formats, such as ``mxfp8_all + mx_v_only``.
        calibration: who chose the blocks: method, clips, fingerprint; empty for nearest rounding.
        verdict: what the run's gate said: ``verdict`` (``none`` without a gate), ``title``, ``against``.
        quantization_config: formats by Linear, as compressed-tensors writes them into a model's config.
        digests: SHA-256 of every tensor, see :func:`digest`.
        version: of this layout.
        sha256: of all the rest of the header, see :func:`header_digest`.
    """

    model: dict[str, Any]
    vae_scale: float
    quant: dict[str, Any]
    kv: dict[str, Any]
    sampler: dict[str, Any]
    label: str
    calibration: dict[str, Any]
    verdict: dict[str, Any]
    quantization_config: dict[str, Any]
    digests: dict[str, str] = field(default_factory=dict)
    version: int = VERSION
    sha256: str = ""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all weights together, see :func:`fingerprint`."""
        return fingerprint(self.digests)


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor: element type, shape, and bytes row by row."""
    sha = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def fingerprint(digests: Mapping[str, str]) -> str:
    """SHA-256 of a model's weights, from the digests of its tensors by name."""
    return hashlib.sha256("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()


def header_digest(header: Mapping[str, Any]) -> str:
    """SHA-256 of a header's plain fields but ``sha256``, as JSON whose keys are in order at every depth."""
    rest = {name: value for name, value in header.items() if name != "sha256"}
    return hashlib.sha256(encode(in_order(rest)).encode()).hexdigest()


def in_order(value: Any) -> Any:
    """Plain data with the keys of every mapping in order, so that the same data is the same text."""
    if isinstance(value, dict):
        return {key: in_order(value[key]) for key in sorted(value)}
    return [in_order(one) for one in value] if isinstance(value, list | tuple) else value


def elements_name(element: ElementFormat) -> str:
    """What a Linear's elements are stored as, behind its name."""
    return "weight_packed" if element is E2M1 else "weight"


def elements_spec(element: ElementFormat, n: int, k: int) -> tuple[torch.dtype, tuple[int, int]]:
    """Element type and shape of a stored [N, K] weight."""
    return (torch.uint8, (n, k // 2)) if element is E2M1 else (element.float8, (n, k))


def tensors_of(name: str, weight: MXWeight) -> dict[str, Tensor]:
    """The tensors that an MX Linear becomes, by their names in the file."""
    element, (n, k) = weight.fmt.element, weight.sizes
    dtype, shape = elements_spec(element, n, k)
    tensors = {
        f"{name}.{elements_name(element)}": weight.blocks.elements.view(dtype).reshape(shape),
        f"{name}.weight_scale": weight.blocks.scales.reshape(n, k // BLOCK),
    }
    if weight.bias is not None:
        tensors[f"{name}.bias"] = weight.bias
    return tensors


def blocks_of(elements: Tensor, scales: Tensor) -> MXBlocks:
    """The inverse of :func:`tensors_of`: both are the bytes of the file."""
    return MXBlocks(elements.view(torch.uint8), scales)


def quantization_config(formats: Mapping[str, ElementFormat], others: list[str]) -> dict[str, Any]:
    """Formats by Linear and the Linears that stay BF16, in the words of compressed-tensors."""
    groups: dict[str, Any] = {}
    for element in dict.fromkeys(formats.values()):
        kind = "mxfp4-pack-quantized" if element is E2M1 else "mxfp8-quantized"
        groups[f"group_{len(groups)}"] = {
            "targets": [name for name, own in formats.items() if own is element],
            "format": kind,
            "weights": {
                "num_bits": element.bits,
                "type": "float",
                "element": element.name,
                "strategy": "group",
                "group_size": BLOCK,
                "symmetric": True,
                "dynamic": False,
                "scale_dtype": "torch.uint8",
            },
        }
    kinds = [group["format"] for group in groups.values()]
    return {
        "quant_method": "compressed-tensors",
        "format": kinds[0] if len(set(kinds)) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": others,
    }
