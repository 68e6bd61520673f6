"""Loads an exported checkpoint one Linear at a time: its BF16 weights never exist.

The file is a stranger's like any other. Its header is bounded and checked before a tensor is read, every tensor's
element type and shape against what the header's config implies before it is allocated, and its bytes against the
digest in the header before it is used. The header has a digest of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from harness.export.layout import (
    KEY,
    MAX_HEADER_BYTES,
    VERSION,
    ExportError,
    ExportHeader,
    blocks_of,
    digest,
    elements_name,
    elements_spec,
    header_digest,
)
from harness.files.tensors import check_header
from harness.files.text import FileError, check_file, parse_json
from harness.formats.mx import BLOCK
from harness.kv import KVConf
from harness.models.config_io import gamerft_config
from harness.models.gamerft import GameRFTConfig, GameRFTCore
from harness.mx.conf import MXConf
from harness.mx.linears.base import LinearFormat, MXWeight
from harness.mx.select import select
from harness.report.codec import CodecError, read
from harness.rollout.conf import SamplerConf

MAX_SIZE = 2**20
"""Of a width, a window or a number of frames in a model's config."""


def is_export(path: str | Path | None) -> bool:
    """Whether ``path`` is an exported checkpoint: a safetensors file whose header says so. Reads the header alone."""
    if path is None or Path(path).suffix != ".safetensors" or not Path(path).is_file():
        return False
    try:
        check_header(Path(path))
        with safe_open(path, "pt") as file:
            return KEY in (file.metadata() or {})
    except (SafetensorError, OSError, ValueError):
        return False  # whoever reads it as a checkpoint says what is wrong with it


class Export:
    """An exported checkpoint, its header read and checked; tensors are read when they are asked for.

    Raises:
        ExportError: naming the file, if it is not one, of another version, or its header does not fit together.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.header = _read_header(self.path)
        origin = f"{self.path}: header"
        try:
            self.arch: GameRFTConfig = gamerft_config(self.header.model, origin)
            self.quant: MXConf = _config(MXConf, self.header.quant, f"{origin}: quant")
            self.kv: KVConf = _config(KVConf, self.header.kv, f"{origin}: kv")
            self.sampler: SamplerConf = _config(SamplerConf, self.header.sampler, f"{origin}: sampler")
        except ValueError as error:
            raise ExportError(str(error)) from error
        self._check_sizes(origin)
        if not self.quant.enabled:
            raise ExportError(f"{origin}: quant is not enabled, so nothing in the file is MX")

    def agrees(self, name: str, conf: MXConf | KVConf) -> bool:
        """Whether ``conf`` (``quant`` or ``kv``) asks for what the file holds; the kernel is not a format."""
        theirs = self.quant if name == "quant" else self.kv
        return self.taken_over(name, conf, theirs) == conf

    def taken_over(self, name: str, own: Any, theirs: Any) -> Any:
        """The file's formats under ``own``'s kernel: what the machine runs is not the file's to say."""
        return dataclasses.replace(theirs, kernel=own.kernel, list=own.list) if name == "quant" else theirs

    def _check_sizes(self, origin: str) -> None:
        """Before a model is built to the header's word: no more layers than tensors, no size beyond any model's."""
        sizes = {name: value for name, value in vars(self.arch).items() if type(value) is int}
        absurd = [f"{name}={value}" for name, value in sizes.items() if value > MAX_SIZE]
        if self.arch.n_layers > len(self.header.digests) or absurd:
            raise ExportError(
                f"{origin}: {', '.join(absurd) or f'n_layers={self.arch.n_layers}'} does not fit a file of "
                f"{len(self.header.digests)} tensors"
            )

    def skeleton(self, device: torch.device) -> GameRFTCore:
        """The model on ``device`` with all that is not MX in place; MX Linears wait on the meta device.

        Give it to :func:`harness.rollout.assembly.assemble` with :meth:`source`.

        Raises:
            ExportError: if the file lacks a tensor, has one too many, or one is not what its header says.
        """
        core = GameRFTCore.skeleton(self.arch, device)
        formats = {one.name: LinearFormat.of(self.quant, one.category) for one in select(core, self.quant).chosen}
        state = {
            name: tensor
            for name, tensor in core.state_dict().items()
            if tensor.is_meta and not name.startswith(tuple(f"{linear}." for linear in formats))
        }
        packed = {name for linear, fmt in formats.items() for name in _names(core, linear, fmt)}
        self._check_names(set(state) | packed)
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        loaded = {name: self.tensor(name, torch.bfloat16, shape).to(device) for name, shape in shapes.items()}
        core.load_state_dict(loaded, strict=False, assign=True)
        return core.eval().requires_grad_(False)

    def source(self, device: torch.device) -> FileWeights:
        """Where :func:`harness.mx.transform.apply_mx` gets the MX Linears' blocks from."""
        return FileWeights(self, device)

    def _check_names(self, expected: set[str]) -> None:
        found = set(self.header.digests)
        missing, unexpected = sorted(expected - found), sorted(found - expected)
        if missing or unexpected:
            raise ExportError(
                f"{self.path}: does not hold the model of its header: {len(missing)} tensors missing "
                f"({', '.join(missing[:5])}), {len(unexpected)} unexpected ({', '.join(unexpected[:5])}); export again"
            )

    def tensor(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """One tensor on the CPU. Raises :class:`ExportError` if it is not of this kind, or not what was written."""
        try:
            with safe_open(self.path, "pt") as file:
                found = file.get_slice(name)
                if tuple(found.get_shape()) != shape:
                    raise ExportError(f"{self.path}: {name} is {found.get_shape()}, its header implies {list(shape)}")
                # A copy: what the library gives lies in the mapped file, and would change with it.
                tensor = file.get_tensor(name).clone()
        except (SafetensorError, OSError) as error:
            raise ExportError(f"{self.path}: {name} cannot be read: {error}") from error
        if tensor.dtype != dtype:
            raise ExportError(f"{self.path}: {name} is {tensor.dtype}, its header implies {dtype}")
        if digest(tensor) != self.header.digests.get(name):
            raise ExportError(
                f"{self.path}: {name} is not what was exported: its SHA-256 is another than the header's. The file is "
                "damaged or was changed; export it again"
            )
        return tensor


class FileWeights:
    """A :class:`harness.mx.weights.WeightSource` that reads each Linear's blocks when its turn comes."""

    def __init__(self, export: Export, device: torch.device) -> None:
        self.export, self.device = export, device

    @property
    def chosen_by(self) -> str:
        """See ``WeightSource``."""
        return str(self.export.header.calibration.get("method", ""))

    def unsuitable(self, name: str, linear: nn.Linear, fmt: LinearFormat) -> str | None:
        """See ``WeightSource``."""
        stored = f"{name}.{elements_name(fmt.element)}"
        return None if stored in self.export.header.digests else f"{self.export.path} has no {stored}"

    def weight(self, name: str, linear: nn.Linear, fmt: LinearFormat) -> MXWeight:
        """See ``WeightSource``."""
        n, k = linear.out_features, linear.in_features
        dtype, shape = elements_spec(fmt.element, n, k)
        elements = self.export.tensor(f"{name}.{elements_name(fmt.element)}", dtype, shape)
        scales = self.export.tensor(f"{name}.weight_scale", torch.uint8, (n, k // BLOCK))
        bias = None if linear.bias is None else self.export.tensor(f"{name}.bias", torch.bfloat16, (n,))
        blocks = blocks_of(elements.to(self.device), scales.to(self.device))
        return MXWeight(blocks, None if bias is None else bias.to(self.device), fmt)


def _names(core: nn.Module, linear: str, fmt: LinearFormat) -> list[str]:
    """What an MX Linear is stored as."""
    bias = ["bias"] if core.get_submodule(linear).bias is not None else []
    return [f"{linear}.{name}" for name in (elements_name(fmt.element), "weight_scale", *bias)]


def _read_header(path: Path) -> ExportHeader:
    try:
        check_file(path, "an exported checkpoint (.safetensors)")
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
        if size > MAX_HEADER_BYTES:
            raise ExportError(f"{path}: its header claims {size} bytes; at most {MAX_HEADER_BYTES}")
        with safe_open(path, "pt") as opened:
            text = (opened.metadata() or {}).get(KEY)
            stored = set(opened.keys())
        if text is None:
            raise ExportError(f"{path}: not an exported checkpoint: its header has no {KEY!r}")
        content = parse_json(text)
    except (FileError, OSError, SafetensorError) as error:
        raise ExportError(str(error) if str(path) in str(error) else f"{path}: header: {error}") from error
    if not isinstance(content, dict) or content.get("version") != VERSION:
        version = content.get("version") if isinstance(content, dict) else None
        raise ExportError(f"{path}: layout version {version!r:.40}; this version reads {VERSION}")
    if content.get("sha256") != header_digest(content):
        raise ExportError(
            f"{path}: header: not what was exported: its SHA-256 is another than it says. The file is damaged or was "
            "changed; export it again"
        )
    try:
        header = read(ExportHeader, content)
    except CodecError as error:
        raise ExportError(f"{path}: header: {error}") from error
    if stored != set(header.digests):
        odd = sorted(stored ^ set(header.digests))
        raise ExportError(f"{path}: tensors and header disagree about {', '.join(odd[:5])}; export it again")
    return header


def _config(kind: Callable[[], Any], fields: dict[str, Any], origin: str) -> Any:
    """A config dataclass from plain fields, types checked."""
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), OmegaConf.create(fields)))
    except OmegaConfBaseException as error:
        raise ExportError(f"{origin}: {str(error).splitlines()[0]}") from error
