"""The two ends of a denoising step of one clip (``embed.cu``, ``velocity.cu``), a launch each.

Noisy latents become the residual stream in front of the first layer; the stream behind the last layer becomes the
velocity and, with it, the next step's latents. Weights are fetched while the kernel in front still runs. For inference.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor, nn

from harness.kernels import rehearsal
from harness.kernels.cuda import nvrtc
from harness.kernels.cuda.conv import fragments
from harness.kernels.cuda.stream import Stream
from harness.kernels.launch import dependent

TOKENS = 8
"""Of a block."""

GROUP = 32
"""Features that a lane's neighbours read together; the width is a multiple of it."""

_EMBED_WARPS = 8
_MOST_WARPS = 16
_WIDEST, _MOST_CHANNELS = 2048, 256  # what registers have room for


def unfit(width: int, channels: int, tokens: int) -> str | None:
    """Why the kernels are not for a model of so many features, latent channels and tokens a frame, or None."""
    if tokens % TOKENS or tokens > 64:
        return f"{tokens} tokens a frame; the kernels take multiples of {TOKENS} up to 64"
    if width % GROUP or width > _WIDEST:
        return f"{width} features; the kernels take multiples of {GROUP} up to {_WIDEST}"
    if channels % 16 or channels > _MOST_CHANNELS:
        return f"{channels} channels; the kernels take multiples of 16 up to {_MOST_CHANNELS}"
    return None


def embed_defines(width: int, channels: int, pdl: bool) -> dict[str, int]:
    """Compile-time parameters of ``embed.cu``."""
    return {"D": width, "C": channels, "WARPS": _EMBED_WARPS, "PDL": int(pdl)}


def velocity_defines(width: int, channels: int, pdl: bool) -> dict[str, int]:
    """Compile-time parameters of ``velocity.cu``: four groups of features a warp, where they are not too many."""
    warps = min(_MOST_WARPS, max(4, -(-width // (4 * GROUP))))
    return {"D": width, "C": channels, "WARPS": warps, "PDL": int(pdl)}


def embed_bytes(defines: dict[str, int]) -> int:
    """Shared memory of a block of ``embed.cu``."""
    return TOKENS * (2 * defines["C"] + 16) + 32 * defines["WARPS"]


def velocity_bytes(defines: dict[str, int]) -> int:
    """Shared memory of a block of ``velocity.cu``."""
    return (512 + 32) * defines["WARPS"]


def pack_embedding(weight: Tensor) -> Tensor:
    """BF16 ``[D, C]`` as ``embed.cu`` reads it: uint8 ``[C/16, D/16, 512]``."""
    return fragments(weight, rows=True)


def pack_velocity(weight: Tensor) -> Tensor:
    """BF16 ``[C, D]`` as ``velocity.cu`` reads it: uint8 ``[D/16, C/16, 512]``.

    Within 32 features it takes them in an order in which a lane's, of two products of 16, are neighbours.
    """
    features = weight.unflatten(-1, (-1, 4, 2, 2, 2))  # of a group: lane, product, word, half of it
    return fragments(features.permute(0, 1, 3, 4, 2, 5).flatten(1), rows=True)


@functools.cache
def source(kernel: str) -> str:
    """A kernel's source."""
    here = Path(__file__).parent
    return "".join((here / name).read_text() for name in ("mx_device.cuh", "conv_device.cuh", kernel))


@functools.cache
def _load(name: str, defines: tuple[tuple[str, int], ...], shared: int, device: int) -> nvrtc.Function:
    make = functools.partial(nvrtc.compile_source, source(f"{name}.cu"), f"{name}.cu", dict(defines), "sm_90a")
    return nvrtc.Function(rehearsal.compiled(make), name, shared)


class _Entered(ctypes.Structure):
    """``Entered`` of ``embed.cu``."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("total", "modulated", "squares"))


class _Latents(ctypes.Structure):
    """``Latents`` of ``velocity.cu``."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("x", "drop", "next", "velocity"))


class StepEnds:
    """Both ends of the steps of one clip, on one GPU; holds packed copies of two small weights.

    Args:
        proj_in: BF16, C to D features, without bias.
        proj_out: BF16, D to C features, with one.
        tokens: P, of a frame.
        eps: of the norm in front of ``proj_out``.

    Raises:
        ValueError: for sizes that :func:`unfit` refuses.
    """

    def __init__(self, proj_in: nn.Linear, proj_out: nn.Linear, tokens: int, eps: float) -> None:
        width, channels = proj_in.weight.shape
        reason = unfit(width, channels, tokens)
        if reason is not None:
            raise ValueError(f"the kernels at a step's ends: {reason}")
        self.width, self.channels, self.tokens, self.eps = width, channels, tokens, eps
        self._device = proj_in.weight.device
        self._into = pack_embedding(proj_in.weight.detach())
        self._out_of = pack_velocity(proj_out.weight.detach())
        assert proj_out.bias is not None
        self._bias = proj_out.bias.detach().clone()
        if self._device.type == "cuda":  # kernels may fetch them before what is queued in front has ended
            torch.cuda.synchronize(self._device)

    def enter(self, x: Tensor, scale: Tensor, shift: Tensor) -> Stream:
        """The residual stream of latents ``x``, in front of a norm of ``scale`` and ``shift``.

        Args:
            x: float32 ``[1, C, S, S]``, contiguous; rounded to BF16.
            scale: BF16, D numbers.
            shift: likewise.

        Raises:
            nvrtc.DriverError: when the driver refuses the launch.
            nvrtc.CompileError: when the kernel does not compile.
        """
        scale, shift = (vector.reshape(self.width).contiguous() for vector in (scale, shift))
        defines = embed_defines(self.width, self.channels, dependent(self._device))
        across = -(-self.width // (16 * _EMBED_WARPS))
        total = scale.new_empty(self.tokens, self.width)
        stream = Stream(total, scale.new_empty(65, self.width), x.new_empty(self.tokens, across))
        entered = _Entered(*(t.data_ptr() for t in stream))
        arguments = (x, self._into, scale, shift, entered, ctypes.c_int(self.tokens))
        self._launch("embed", defines, embed_bytes(defines), (across, self.tokens // TOKENS), arguments)
        return stream

    def leave(self, total: Tensor, scale: Tensor, shift: Tensor, x: Tensor, drop: Tensor) -> tuple[Tensor, Tensor]:
        """``(x - drop * velocity, velocity)``, both float32 ``[1, C, S, S]``, of a step's last residual stream.

        Args:
            total: BF16 ``[P, D]``, contiguous.
            scale: BF16, D numbers, of the norm in front of the projection.
            shift: likewise.
            x: the step's latents, float32 ``[1, C, S, S]``, contiguous.
            drop: float32, one number on the device.

        Raises as :meth:`enter`.
        """
        vectors = [vector.reshape(self.width).contiguous() for vector in (scale, shift)]
        defines = velocity_defines(self.width, self.channels, dependent(self._device))
        after, velocity = torch.empty_like(x), torch.empty_like(x)
        latents = _Latents(*(t.data_ptr() for t in (x, drop, after, velocity)))
        arguments = (
            total,
            *vectors,
            self._out_of,
            self._bias,
            latents,
            ctypes.c_int(self.tokens),
            ctypes.c_float(self.eps),
        )
        grid = (self.channels // 16, self.tokens // TOKENS)
        self._launch("velocity", defines, velocity_bytes(defines), grid, arguments)
        return after, velocity

    def _launch(
        self, name: str, defines: dict[str, int], shared: int, grid: tuple[int, int], arguments: tuple[object, ...]
    ) -> None:
        with torch.cuda.device(self._device):
            function = _load(name, tuple(defines.items()), shared, torch.cuda.current_device())
            function.launch(grid, 32 * defines["WARPS"], arguments, bool(defines["PDL"]))
