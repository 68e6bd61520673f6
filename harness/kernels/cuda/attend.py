"""``mx_attend.cu`` as a function of tensors: a frame's attention from the residual stream on, in one launch.

Of one clip, 64 tokens a frame, heads of 64. It does what a product (``mx_linear.cu``) and ``window_attention`` do, one
after the other, and rounds where they round; sums are added up in another order.
"""

import ctypes
import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from harness.formats.mx import FORMATS, carry_threshold
from harness.formats.scales import ScaleMode
from harness.kernels import rehearsal
from harness.kernels.cuda import nvrtc
from harness.kernels.cuda.packing import GROUP, decoding, element_bits, groups, tile_bytes
from harness.kernels.cuda.shapes import PLACES, SHARED_BYTES
from harness.kernels.cuda.stream import Squares, Stream

if TYPE_CHECKING:
    from harness.kernels.cuda.ops import PackedWeight

TOKENS = 64
"""Of a frame."""

DIM = 64
"""Of a head."""

_WARPS, _THREADS = 12, 13 * 32
_ROW = 2 * DIM
_FRAME = TOKENS * _ROW
_PIECE = 16
"""Rows of the window that are fetched at once."""

_MOST_STAGES = 4


class Ring(NamedTuple):
    """Keys or values of one layer's window: ``data [1, H, R, 64, width]`` and, unless that is BF16, E8M0 bytes ``scales
    [1, H, R, 64, 2]``; contiguous."""

    data: Tensor
    scales: Tensor | None


@dataclass(frozen=True)
class AttendShape:
    """What a kernel is compiled for.

    Attributes:
        inputs: K of the projection, the model's width.
        element: of its weight, "bf16" or an MX element.
        k: format of keys in their ring.
        v: of values.
        k_stores: whether the frame's own keys go into their ring.
        v_stores: values likewise.
        mode: how the scale of a stored block is chosen.
        cluster: blocks of a head.
        dependent: whether it is launched as ``harness.kernels.launch`` describes.
    """

    inputs: int
    element: str
    k: str
    v: str
    k_stores: bool
    v_stores: bool
    mode: ScaleMode
    cluster: int
    dependent: bool = False

    @property
    def held(self) -> int:
        """Groups of 64 inputs that a block holds."""
        return -(-groups(self.inputs) // self.cluster)

    @property
    def fetched(self) -> int:
        """Groups of a weight that arrive together: half of them, or a third, so that products begin with the first."""
        return -(-self.held // (2 if element_bits(self.element) < 16 else 3))

    @property
    def waiting(self) -> int:
        """How many such fetches a warp has on their way: two, of BF16, which leaves no room for more."""
        return min(2, -(-self.held // self.fetched))

    def stages(self) -> int:
        """Times 64 rows of the window that a warpgroup has on their way: as many as find room; 0: there is none."""
        most = range(_MOST_STAGES, 0, -1)
        enough = (n for n in most if n * self._stage >= 2 * _FRAME + 256 and self.shared_bytes(n) <= SHARED_BYTES)
        return next(enough, 0)

    @property
    def _bits(self) -> list[int]:
        return [storage_bits(fmt) for fmt in (self.k, self.v)]

    @property
    def _stage(self) -> int:
        return -(-sum(_FRAME * b // 16 + 128 * (b < 16) for b in self._bits) // 1024) * 1024

    def shared_bytes(self, stages: int) -> int:
        """Shared memory of a block, as ``mx_attend.cu`` divides it."""
        across = -(-8 // self.cluster)
        own_rows = -(-across * 8 // 16) * 16
        w = _WARPS * self.waiting * self.fetched * tile_bytes(element_bits(self.element))
        operands = self.held * 9 * 1024 + w
        window = _FRAME + 2 * own_rows * _ROW + 3 * stages * self._stage + 3 * sum(_FRAME for b in self._bits if b < 16)
        partial = self.cluster * max(across * _WARPS * 512, -(-32 // self.cluster) * 512 + 256)
        barriers = self.held + _WARPS * self.waiting + 4 + 3 * stages
        return max(operands, window) + partial + 8 * barriers + 4 * TOKENS

    def defines(self) -> dict[str, int]:
        """Compile-time parameters of ``mx_attend.cu``."""
        return decoding(self.element) | {
            "MT": 8,
            "RT": 1,
            "GS": 1,
            "NORM": 1,
            "CL": self.cluster,
            "GX": self.held,
            "FETCHED": self.fetched,
            "WAITING": self.waiting,
            "STAGES": self.stages(),
            "PDL": int(self.dependent),
            **_storage("K", self.k, self.k_stores, self.mode),
            **_storage("V", self.v, self.v_stores, self.mode),
        }


def storage_bits(fmt: str) -> int:
    """Bits of an element in a ring."""
    return 16 if fmt == "plain" else FORMATS[fmt].bits


def _storage(name: str, fmt: str, stores: bool, mode: ScaleMode) -> dict[str, int]:
    mantissa = {"plain": 7, "e4m3": 3, "e5m2": 2, "e2m1": 1}[fmt]
    threshold = 0 if fmt == "plain" else carry_threshold(FORMATS[fmt], mode)
    return {
        f"{name}_BITS": storage_bits(fmt),
        f"{name}_MANTISSA": mantissa,
        f"{name}_STORE": int(stores),
        f"{name}_THRESHOLD": threshold,
    }


def cluster_of(heads: int, dim: int, tokens: int, batch: int, device: torch.device) -> int:
    """Blocks of a head, 2 to 8, as many as find a place at the same time; 0 where the kernel is not for such a layer.

    It is for one clip, 64 tokens a frame, heads of 64, and of no more heads than there are places for two blocks each.
    """
    if (dim, tokens, batch) != (DIM, TOKENS, 1):
        return 0
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
    found = _clusters(index) if device.type == "cuda" else {size: places // size for size, places in PLACES.items()}
    return max((size for size, clusters in found.items() if size > 1 and heads <= clusters), default=0)


@functools.cache
def _clusters(device: int | None) -> dict[int, int]:
    """How many clusters of each size a GPU has places for, of blocks that fill a multiprocessor each.

    Two GPUs of a kind differ in which of their multiprocessors work, and so in this.
    """
    cubin = nvrtc.compile_source('extern "C" __global__ void places() {}', "places.cu", {}, "sm_90a")
    with torch.cuda.device(device):
        torch.cuda.synchronize()  # the driver needs a context, which nobody may have asked for yet
        function = nvrtc.Function(cubin, "places", SHARED_BYTES)
        return {size: function.clusters_at_once(_THREADS, size) for size in range(1, 9)}


class Window(ctypes.Structure):
    """``Window`` of ``mx_attend.cu``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("k", "k_scales", "v", "v_scales", "slot", "cos", "sin")),
        ("heads", ctypes.c_int),
        ("frames", ctypes.c_int),
        ("scale", ctypes.c_float),
        ("eps", ctypes.c_float),
    )


def attend(
    stream: Stream,
    weight: "PackedWeight",
    shape: AttendShape,
    rings: tuple[Ring, Ring],
    slot: Tensor,
    rotary: tuple[Tensor, Tensor],
    eps: float,
) -> Tensor:
    """BF16 [64, H*64]: attention of a frame of one clip, from the norm of its residual stream on.

    Args:
        stream: the residual stream, in front of a projection to queries, keys and values.
        weight: the projection's, [3*H*64, K].
        shape: what ``weight`` and ``rings`` are, and which of these the frame's own keys and values go into.
        rings: of keys and of values, written in place.
        slot: int64 [1] on the device; what lies there has left the window.
        rotary: cosines and sines, float32 [64, 32], contiguous.
        eps: of the norm in front and of those of queries and keys.

    Raises ``nvrtc.DriverError`` when the driver refuses the launch, ``nvrtc.CompileError`` when it does not compile.
    """
    from harness.kernels.cuda.ops import loading  # a module of operators of CUDA tensors alone

    (k, v), device = rings, stream.total.device
    heads, frames = k.data.shape[1:3]
    out = torch.empty(TOKENS, heads * DIM, dtype=torch.bfloat16, device=device)
    pointers = (k.data, k.scales, v.data, v.scales, slot, *rotary)
    window = Window(
        *(None if t is None else t.data_ptr() for t in pointers),
        heads,
        frames,
        math.log2(math.e) / math.sqrt(DIM),
        eps,
    )
    with torch.cuda.device(device), loading:
        function = _load(shape, torch.cuda.current_device())
        x_map = nvrtc.TensorMap(stream.modulated, TOKENS + 8, GROUP)
        maps = (nvrtc.TensorMap(r.data.view(-1, DIM), _PIECE, GROUP) if r.scales is None else x_map for r in rings)
        arguments = (
            x_map,
            *maps,
            weight.tiles,
            weight.bias,
            out,
            ctypes.c_int(weight.tiles.shape[1]),
            ctypes.c_float(weight.output_scale),
            Squares.of_stream(stream, eps),
            window,
        )
        function.launch((heads * shape.cluster, 1), _THREADS, arguments, shape.dependent)
    return out


def compiled(shape: AttendShape) -> bytes:
    """The cubin of ``shape``; any thread may ask."""
    from harness.kernels.cuda.ops import source

    return nvrtc.compile_source(source("mx_attend.cu"), "mx_attend.cu", shape.defines(), "sm_90a")


@functools.cache
def _load(shape: AttendShape, device: int) -> nvrtc.Function:
    make = functools.partial(compiled, shape)
    return nvrtc.Function(rehearsal.compiled(make), "mx_attend", shape.shared_bytes(shape.stages()))
