"""``conditioning.cu`` as functions of tensors: what of one clip's frame comes before its layers' modulation.

Weights are read before what is queued in front has ended (``harness.kernels.launch``): whoever has just written them
waits for the device once. Each shape is compiled at its first use and kept.
"""

import ctypes
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from harness.kernels import launch, rehearsal
from harness.kernels.cuda import nvrtc

HIDDEN, DIRECTIONS, FREQUENCIES = 2048, 256, 128
"""Hidden activations of each of the controls' MLPs; the mouse's features: of its direction, half of its magnitude's."""

MOST_RINGS = 4
"""Sizes of rings that a cache has slots for."""

_MOST_WIDTH, _MOST_STEPS, _MOST_BUTTONS = 2560, 8, 256
_THREADS = 256
_HIDDEN_OUTPUTS, _OUTPUTS, _PLAIN_OUTPUTS = 16, 8, 16  # of a block


@dataclass(frozen=True)
class ConditioningShape:
    """What the kernels are compiled for.

    Attributes:
        width: D of the model.
        steps: of a frame.
        buttons: of an action.
        tokens: of a frame.
        pairs: that a head rotates, half of its size.
    """

    width: int
    steps: int
    buttons: int
    tokens: int
    pairs: int

    def unfit(self) -> str | None:
        """Why there are no kernels for this shape, or None."""
        if self.width % 16 or self.width > _MOST_WIDTH:
            return f"width {self.width} is not a multiple of 16 up to {_MOST_WIDTH}"
        for name, most in (("steps", _MOST_STEPS), ("buttons", _MOST_BUTTONS)):
            if not 1 <= getattr(self, name) <= most:
                return f"{getattr(self, name)} {name}: the kernels take 1 to {most}"
        return None

    def shared_bytes(self) -> dict[str, int]:
        """Shared memory of a block of each kernel."""
        return {
            "begin_frame": 4 * DIRECTIONS,
            "add_controls": 4 * HIDDEN,
            "plain_product": 2 * self.steps * self.width,
        }

    def defines(self, dependent: bool) -> dict[str, int]:
        """Compile-time parameters of ``conditioning.cu``; ``dependent``: as ``harness.kernels.launch`` tells."""
        sizes = {"WIDTH": self.width, "STEPS": self.steps, "BUTTONS": self.buttons}
        sizes |= {"TOKENS": self.tokens, "PAIRS": self.pairs, "PLAIN_BLOCKS": self._plain_blocks}
        return sizes | {"PDL": int(dependent)}

    @property
    def _plain_blocks(self) -> int:
        """Blocks of ``plain_product`` that registers have room for, weights among them, without spilling any."""
        if self.width <= 1536 and self.steps <= 4:
            return 3
        return 2 if self.width <= 2048 else 1


class ControlWeights(NamedTuple):
    """Of the controls' MLPs, BF16, contiguous, from addresses that are multiples of 16.

    Attributes:
        angle: [256, 2], the mouse's direction to features.
        mouse_in: [2048, 512], of features.
        mouse_in_bias: [2048].
        mouse_out: [D, 2048].
        mouse_out_bias: [D].
        button_in: [2048, buttons].
        button_in_bias: [2048].
        button_out: [D, 2048].
        button_out_bias: [D].
    """

    angle: Tensor
    mouse_in: Tensor
    mouse_in_bias: Tensor
    mouse_out: Tensor
    mouse_out_bias: Tensor
    button_in: Tensor
    button_in_bias: Tensor
    button_out: Tensor
    button_out_bias: Tensor

    def unfit(self, shape: ConditioningShape) -> str | None:
        """Why the kernels cannot read these for ``shape``, or None."""
        hidden, width = HIDDEN, shape.width
        sizes = {
            "angle": (DIRECTIONS, 2),
            "mouse_in": (hidden, DIRECTIONS + 2 * FREQUENCIES),
            "mouse_in_bias": (hidden,),
            "mouse_out": (width, hidden),
            "mouse_out_bias": (width,),
            "button_in": (hidden, shape.buttons),
            "button_in_bias": (hidden,),
            "button_out": (width, hidden),
            "button_out_bias": (width,),
        }
        found = (_unfit(name, x, sizes[name], torch.bfloat16) for name, x in self._asdict().items())
        return next((reason for reason in found if reason is not None), None)


class FrameClock(NamedTuple):
    """Where a frame lies in a cache and in time; written in place when it begins.

    A token's angles in frame f are ``(base + time * uses_time) * freqs``, where ``time`` is ``times[f]`` and, behind
    the last of these, goes on from it by ``step`` a frame.

    Attributes:
        frame: int64 [1], index of the last frame, then of this one.
        slots: of rings of so many frames, int64 [1] each: the frame's slot.
        times: float32 [n].
        base: float32 [tokens, pairs].
        uses_time: float32 [pairs], zeros and ones.
        freqs: float32 [pairs].
        step: see above.
    """

    frame: Tensor
    slots: Mapping[int, Tensor]
    times: Tensor
    base: Tensor
    uses_time: Tensor
    freqs: Tensor
    step: float

    def unfit(self, shape: ConditioningShape) -> str | None:
        """Why the kernel cannot keep this clock for ``shape``, or None."""
        if len(self.slots) > MOST_RINGS:
            return f"rings of {len(self.slots)} sizes: the kernels know {MOST_RINGS}"
        floats = {
            "base": (self.base, (shape.tokens, shape.pairs)),
            "uses_time": (self.uses_time, (shape.pairs,)),
            "freqs": (self.freqs, (shape.pairs,)),
            "times": (self.times, (self.times.numel(),)),
        }
        found = [_unfit(name, x, sizes, torch.float32) for name, (x, sizes) in floats.items()]
        found += [_unfit("a counter", x, (1,), torch.int64) for x in (self.frame, *self.slots.values())]
        return next((reason for reason in found if reason is not None), None)


def _unfit(name: str, x: Tensor, sizes: tuple[int, ...], dtype: torch.dtype) -> str | None:
    if tuple(x.shape) != sizes or x.dtype is not dtype or not x.is_contiguous():
        return f"{name} is {x.dtype} {tuple(x.shape)}, the kernels take contiguous {dtype} {sizes}"
    if dtype is torch.bfloat16 and x.data_ptr() % 16:
        return f"{name} begins at {x.data_ptr():#x}, no multiple of 16"
    return None


class Counter(ctypes.Structure):
    """``Counter`` of ``conditioning.cu``."""

    _fields_ = (
        ("frame", ctypes.c_void_p),
        ("slots", ctypes.c_void_p * MOST_RINGS),
        ("frames", ctypes.c_int * MOST_RINGS),
        ("rings", ctypes.c_int),
    )

    @classmethod
    def of(cls, clock: FrameClock) -> "Counter":
        """That of ``clock``."""
        slots = [slot.data_ptr() for slot in clock.slots.values()]
        places, frames = (ctypes.c_void_p * MOST_RINGS)(*slots), (ctypes.c_int * MOST_RINGS)(*clock.slots)
        return cls(clock.frame.data_ptr(), places, frames, len(slots))


class Rotation(ctypes.Structure):
    """``Rotation`` of ``conditioning.cu``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("before", "times", "base", "uses_time", "freqs", "cos", "sin")),
        ("last", ctypes.c_int),
        ("step", ctypes.c_float),
    )

    @classmethod
    def of(cls, clock: FrameClock, rotary: tuple[Tensor, Tensor]) -> "Rotation":
        """That of ``clock``, to ``rotary``: cosines and sines, float32 [tokens, pairs] each."""
        read = (clock.frame, clock.times, clock.base, clock.uses_time, clock.freqs, *rotary)
        return cls(*(x.data_ptr() for x in read), clock.times.numel() - 1, clock.step)


class FirstWeights(ctypes.Structure):
    """``FirstWeights`` of ``conditioning.cu``."""

    _names = ("angle", "freqs", "mouse", "mouse_bias", "button", "button_bias")
    _fields_ = tuple((name, ctypes.c_void_p) for name in _names)

    @classmethod
    def of(cls, weights: ControlWeights, freqs: Tensor) -> "FirstWeights":
        """Of ``weights``, and of the magnitude's frequencies, float32 [128]."""
        used = (weights.mouse_in, weights.mouse_in_bias, weights.button_in, weights.button_in_bias)
        return cls(*(x.data_ptr() for x in (weights.angle, freqs, *used)))


class SecondWeights(ctypes.Structure):
    """``SecondWeights`` of ``conditioning.cu``."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("mouse", "mouse_bias", "button", "button_bias"))

    @classmethod
    def of(cls, weights: ControlWeights) -> "SecondWeights":
        """Of ``weights``."""
        used = (weights.mouse_out, weights.mouse_out_bias, weights.button_out, weights.button_out_bias)
        return cls(*(x.data_ptr() for x in used))


def begin_frame(
    shape: ConditioningShape, weights: ControlWeights, freqs: Tensor, controls: tuple[Tensor, Tensor], clock: FrameClock
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Hidden activations of the controls of the frame behind ``clock``'s, and its rotation.

    Args:
        shape: what all that is given fits, see the ``unfit`` of each.
        weights: of the controls' MLPs.
        freqs: of the magnitude's sines, float32 [128].
        controls: mouse [2] and buttons, float32, contiguous.
        clock: of the cache.

    Returns:
        BF16 [2, 2048], the mouse's first; cosines and sines, float32 [tokens, pairs] each.

    Raises ``nvrtc.DriverError`` when the driver refuses the launch, ``nvrtc.CompileError`` when it does not compile.
    """
    mouse, buttons = controls
    hidden = torch.empty(2, HIDDEN, dtype=torch.bfloat16, device=mouse.device)
    cos, sin = (torch.empty(shape.tokens, shape.pairs, device=mouse.device) for _ in range(2))
    arguments = (mouse, buttons, FirstWeights.of(weights, freqs), hidden, Rotation.of(clock, (cos, sin)))
    blocks = HIDDEN // _HIDDEN_OUTPUTS + -(-shape.tokens * shape.pairs // _THREADS)
    _launch("begin_frame", shape, mouse.device, blocks, arguments)
    return hidden, (cos, sin)


def add_controls(
    shape: ConditioningShape, weights: ControlWeights, hidden: Tensor, embedded: Tensor, clock: FrameClock
) -> Tensor:
    """BF16 [steps, D]: SiLU of each step's conditioning; and ``clock`` goes on to the next frame.

    Args:
        shape: what ``weights`` fits.
        weights: of the controls' MLPs.
        hidden: what ``begin_frame`` gave.
        embedded: the steps' times, embedded: BF16 [steps, D], contiguous, and written by nothing that still runs.
        clock: that ``begin_frame`` was given; its counter and slots are written.

    Raises as ``begin_frame``.
    """
    conditioning = torch.empty(shape.steps, shape.width, dtype=torch.bfloat16, device=hidden.device)
    arguments = (hidden, SecondWeights.of(weights), embedded, conditioning, Counter.of(clock))
    _launch("add_controls", shape, hidden.device, shape.width // _OUTPUTS, arguments)
    return conditioning


def plain_product(shape: ConditioningShape, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` of BF16 ``x`` [steps, D]: BF16 [steps, N]; for weights see ``unfit_product``.

    Raises as ``begin_frame``.
    """
    outputs = len(weight)
    out = torch.empty(shape.steps, outputs, dtype=torch.bfloat16, device=x.device)
    arguments = (x, weight, bias, out, ctypes.c_int(outputs))
    _launch("plain_product", shape, x.device, outputs // _PLAIN_OUTPUTS, arguments)
    return out


def unfit_times(shape: ConditioningShape, embedded: Tensor) -> str | None:
    """Why ``add_controls`` cannot take the steps' times, embedded, or None."""
    return _unfit("the times' embedding", embedded, (shape.steps, shape.width), torch.bfloat16)


def unfit_product(shape: ConditioningShape, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why ``plain_product`` cannot take a weight, or None: it takes BF16 [N, D], N a multiple of 16, and [N]."""
    outputs = len(weight)
    if outputs % _PLAIN_OUTPUTS:
        return f"{outputs} outputs are not a multiple of {_PLAIN_OUTPUTS}"
    reason = _unfit("a modulation weight", weight, (outputs, shape.width), torch.bfloat16)
    return reason if reason or bias is None else _unfit("its bias", bias, (outputs,), torch.bfloat16)


def _launch(name: str, shape: ConditioningShape, device: torch.device, blocks: int, arguments: Sequence) -> None:
    from harness.kernels.cuda.ops import loading  # a module of operators of CUDA tensors alone

    with torch.cuda.device(device), loading:
        dependent = launch.dependent(device)
        function = _load(shape, dependent, torch.cuda.current_device())[name]
        function.launch((blocks, 1), _THREADS, arguments, dependent)


def compiled(shape: ConditioningShape, dependent: bool) -> bytes:
    """The cubin of ``shape``; any thread may ask."""
    here = Path(__file__).parent
    source = "".join((here / name).read_text() for name in ("mx_device.cuh", "conditioning.cu"))
    return nvrtc.compile_source(source, "conditioning.cu", shape.defines(dependent), "sm_90a")


@functools.cache
def _load(shape: ConditioningShape, dependent: bool, device: int) -> dict[str, nvrtc.Function]:
    cubin = rehearsal.compiled(functools.partial(compiled, shape, dependent))
    return {name: nvrtc.Function(cubin, name, shared) for name, shared in shape.shared_bytes().items()}
