"""``kernel=triton``: an MX Linear whose packed weight our own Triton kernels read directly.

Runs on NVIDIA GPUs from compute capability 8.0 on; written for Hopper. Equal to the emulated kernels up to the order
of float32 summation (on FP8 tensor cores also up to their rounding inside a block of 32: Hopper aligns the products
of one instruction to about 14 bits).
"""

import importlib.util
import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.formats.mx import BLOCK, E2M1, E4M3, E5M2, ElementFormat, MXBlocks, decode, encode, scale_values
from harness.kernels.triton import packing
from harness.kernels.triton.shapes import GemmConfig, Path, Shape, machine, tile_width
from harness.mx.conf import Activation
from harness.mx.linears.base import LinearFormat, MXModule, MXWeight


def unavailable(device: torch.device, fmt: LinearFormat) -> str | None:
    """Why the Triton kernels cannot run on ``device``, or None. Every format is supported where any is."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (torch's CUDA builds bring it)"
    if device.type != "cuda":
        return f"the Triton kernels need an NVIDIA GPU, the model is on {device.type}"
    if torch.version.hip is not None:
        return "the Triton kernels are written for NVIDIA GPUs, this is a ROCm build of torch"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the Triton kernels need BF16 tensor cores (sm_80 or newer), this GPU is sm_{major}{minor}"
    return None


def paths(fmt: LinearFormat, capability: tuple[int, int]) -> tuple[Path, ...]:
    """The tensor cores that can multiply ``fmt``, fastest at a frame's rows first (docs/performance.md).

    FP8 ones take part where both operands are MX with elements that E4M3 holds and the GPU has them.
    """
    operands = {fmt.element.name, (fmt.activation_element or E5M2).name}
    return ("bf16", "fp8") if operands <= {E4M3.name, E2M1.name} and capability >= (8, 9) else ("bf16",)


class TritonMXLinear(MXModule):
    """Linear over a packed MX weight; activations BF16, or MX blocks encoded at every call.

    Buffers: ``elements`` uint8 [tiles, NP, width] and ``scales`` int32 [blocks/4, NP] (see ``packing``), ``bias`` BF16
    [N] or None, ``arrived`` int32, counters of split K's programs, zero between calls. ``path`` says which tensor cores
    multiply; with "bf16" MX activations are rounded to MX and enter as BF16, which is exact. ``config`` overrides the
    launch shape (see ``triton_config.choose``) for every M.

    Two streams must not run one module at the same time: they would share the counters.
    """

    elements: Tensor
    scales: Tensor
    arrived: Tensor
    config: GemmConfig | None = None

    def __init__(
        self, packed: packing.PackedWeight, sizes: tuple[int, int], bias: Tensor | None, fmt: LinearFormat, path: Path
    ) -> None:
        """``sizes`` are (out_features, in_features) of the weight that ``packed`` holds."""
        super().__init__()
        self.fmt, self.path, self.wide = fmt, path, packed.wide
        self.out_features, self.in_features = sizes
        self.padded = packing.padded_inputs(self.in_features, fmt.element)
        self.capability = machine(packed.elements.device)[0]
        self.register_buffer("elements", packed.elements)
        self.register_buffer("scales", packed.scales)
        self.register_buffer("bias", bias)
        arrived = torch.zeros(self._most_tiles(), dtype=torch.int32, device=packed.scales.device)
        self.register_buffer("arrived", arrived, persistent=False)

    @classmethod
    def from_weight(cls, weight: MXWeight, path: Path | None = None) -> "TritonMXLinear":
        """Pack ``weight``. ``path`` None: the fastest one.

        Raises ValueError when ``path`` is "fp8" and an operand is not MX with elements that E4M3 holds.
        """
        blocks, bias, fmt = weight
        path = path or paths(fmt, machine(blocks.scales.device)[0])[0]
        if path not in paths(fmt, (9, 0)):
            raise ValueError(f"path=fp8 cannot compute {fmt.numeric_path}: both operands must be MX E4M3 or E2M1")
        packed = packing.pack(blocks, fmt.element, tile_width(fmt.element.bits, path))
        return cls(packed, weight.sizes, bias, fmt, path)

    def stacked(self, others: Sequence[nn.Module]) -> "TritonMXLinear | None":
        """One Linear whose output is that of this one, then those of ``others``, which read the same input.

        Their packed weights become views of its own, so nothing is held twice; called again, it reuses them. None
        when they do not fit together: another format or K, padded outputs, or too large for 32-bit addresses.
        """
        members = [self, *(other for other in others if isinstance(other, TritonMXLinear))]
        kind = {(m.fmt, m.path, m.in_features, m.bias is None) for m in members}
        outputs = [m.out_features for m in members]
        size = sum(outputs) * self.elements.shape[0] * self.elements.shape[2]
        if len(members) <= len(others) or len(kind) > 1 or any(n % packing.ROWS for n in outputs) or size >= 2**31:
            return None
        with torch.inference_mode(False):
            elements = _joined(members, "elements", outputs)
            scales = _joined(members, "scales", outputs)
            bias = None if self.bias is None else torch.cat([m.bias for m in members if m.bias is not None])
            packed = packing.PackedWeight(elements, scales, any(m.wide for m in members))
            return TritonMXLinear(packed, (sum(outputs), self.in_features), bias, self.fmt, self.path)

    def forward(self, x: Tensor) -> Tensor:
        """Map BF16 [..., K] to BF16 [..., N]."""
        operands = self.operands(x.reshape(-1, self.in_features))
        return self.product(*operands).view(*x.shape[:-1], self.out_features)

    def operands(self, rows: Tensor) -> tuple[Tensor, ...]:
        """BF16 rows [M, K] as the path's kernel takes them, for ``product``: encoded if activations are to be MX."""
        if self.padded > self.in_features:
            rows = F.pad(rows, (0, self.padded - self.in_features))
        rows = rows.contiguous()
        return self._encoded(rows) if self.path == "fp8" else (self._rounded(rows),)

    def product(self, *operands: Tensor) -> Tensor:
        """BF16 [M, N] from what ``operands`` made of the rows."""
        from harness.kernels.triton import ops as triton_ops  # needs the package triton, which CPU builds of torch lack

        gemm = triton_ops.gemm_fp8 if self.path == "fp8" else triton_ops.gemm_bf16
        weight = (self.elements, self.scales, self.bias, self.arrived, self.out_features, self.fmt.element.name)
        return gemm(*operands, *weight, self.wide, [] if self.config is None else self.config.as_ints())

    def extra_repr(self) -> str:
        """What two of them must share to run the same code."""
        return f"{super().extra_repr()}, {self.path} tensor cores, {'any' if self.wide else 'ordinary'} scales"

    def weight_blocks(self) -> MXBlocks:
        """The weight in MX form, unpacked."""
        packed = packing.PackedWeight(self.elements, self.scales, self.wide)
        return packing.unpack(packed, self.fmt.element, self.out_features, self.in_features)

    def weight_bytes(self) -> int:
        """Elements and scales with their padding, bias and counters."""
        buffers = (self.elements, self.scales, self.bias, self.arrived)
        return sum(buffer.nbytes for buffer in buffers if buffer is not None)

    def shape(self, rows: int) -> Shape:
        """The product of this weight and ``rows`` activation rows."""
        return Shape(rows, self.out_features, self.padded, self.fmt.element.bits, self.path)

    def _most_tiles(self) -> int:
        """Enough for every launch that splits K: of up to 1024 rows, in blocks of 64 by 64 or larger, or 16 rows."""
        return -(-self.out_features // 64) * 16

    def _encoded(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [M, KP] as ``gemm_fp8`` reads them; in compiled code by operations that fuse with what made the rows."""
        from harness.kernels.triton import ops as triton_ops

        element, mode = self._activation_element(), self.fmt.scale_mode
        if not torch.compiler.is_compiling():
            return triton_ops.quantise(rows, element.name, str(mode))
        blocks = encode(rows, element, mode)
        if element is E2M1:
            ones = MXBlocks(blocks.elements, torch.full_like(blocks.scales, 127))
            elements = decode(ones, E2M1).to(E4M3.float8).view(torch.uint8)
        else:
            elements = blocks.elements
        tiles = elements.unflatten(1, (-1, BLOCK)).transpose(0, 1).contiguous()
        return tiles, scale_values(blocks.scales, torch.float32).t().contiguous()

    def _rounded(self, rows: Tensor) -> Tensor:
        """Rows [M, KP] rounded to MX if activations are to be, in BF16."""
        from harness.kernels.triton import ops as triton_ops

        if self.fmt.activation == Activation.bf16:
            return rows
        element, mode = self._activation_element(), self.fmt.scale_mode
        # Compilers convert to E4M3 only where the GPU can.
        if torch.compiler.is_compiling() and self.capability >= (8, 9):
            return decode(encode(rows, element, mode), element)
        return triton_ops.round_to_mx(rows, element.name, str(mode))

    def _activation_element(self) -> ElementFormat:
        element = self.fmt.activation_element
        assert element is not None
        return element


def _joined(members: Sequence[TritonMXLinear], name: str, outputs: Sequence[int]) -> Tensor:
    """Buffer ``name`` of all members side by side (dimension 1); theirs become views of it, unless they are already."""
    parts = [getattr(m, name) for m in members]
    shape = (parts[0].shape[0], sum(outputs), *parts[0].shape[2:])
    stride = parts[0].stride()
    row = stride[1] * parts[0].element_size()
    starts = [parts[0].data_ptr() + row * n for n in itertools.accumulate(outputs, initial=0)]
    whole = stride[0] == shape[1] * stride[1]
    if whole and [part.data_ptr() for part in parts] == starts[:-1]:
        return parts[0].as_strided(shape, stride)
    joined = torch.cat(parts, dim=1)
    for member, part in zip(members, joined.split(list(outputs), dim=1), strict=True):
        setattr(member, name, part)
    return joined
