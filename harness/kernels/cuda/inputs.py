"""A frame's inputs to where its CUDA graph reads them, in one launch that takes the host a few microseconds.

The host's time counts: a frame begins after it. So all that does not change from frame to frame is made ready once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from harness.kernels.cuda import nvrtc

_THREADS = 256
_INVALID_CONTEXT = 201  # CUresult: this thread has not used the GPU yet


class InputCopies:
    """Copies to up to three float32 buffers on one CUDA device, which stay where they are.

    Raises ``nvrtc.CompileError`` or ``nvrtc.DriverError`` where the kernel cannot be built.
    """

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        self._buffers, self._device = list(buffers), buffers[0].device
        self._shapes = [buffer.shape for buffer in buffers]
        self._index = torch.cuda.current_device() if self._device.index is None else self._device.index
        major, minor = torch.cuda.get_device_capability(self._device)
        source = (Path(__file__).parent / "inputs.cu").read_text()
        cubin = nvrtc.compile_source(source, "inputs.cu", {}, f"sm_{major}{minor}")
        with torch.cuda.device(self._device):
            function = nvrtc.Function(cubin, "copy_inputs", 0)
        sizes = [buffer.numel() for buffer in buffers]
        spare = 3 - len(sizes)
        self._from = [ctypes.c_void_p() for _ in range(3)]
        to = [ctypes.c_void_p(buffer.data_ptr()) for buffer in buffers] + [ctypes.c_void_p()] * spare
        self._launch = function.prepared(
            (-(-max(sizes) // _THREADS), 1),
            _THREADS,
            [*self._from, *to, *map(ctypes.c_int, sizes + [0] * spare)],
        )

    def __call__(self, given: Sequence[Tensor]) -> bool:
        """Queue the copies on the current stream; False if it cannot take these tensors, or not in this thread yet.

        It takes float32, contiguous, of the buffers' shapes, on their device, which is the current one.
        """
        for x, shape, at in zip(given, self._shapes, self._from, strict=False):
            if x.dtype is not torch.float32 or x.device != self._device or x.shape != shape or not x.is_contiguous():
                return False
            at.value = x.data_ptr()
        if torch._C._cuda_getDevice() != self._index:
            return False
        return self._launch(torch._C._cuda_getCurrentRawStream(self._index), _INVALID_CONTEXT)
