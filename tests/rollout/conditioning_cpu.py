"""The kernels of ``conditioning.cu`` on a CPU, in place of their launches."""

import ctypes
import sys
from pathlib import Path

import cpp
import torch

from harness.kernels.cuda import conditioning

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "harness" / "kernels" / "cuda"
PARTS = [HERE.parent / "mx" / "mx_device_cpu.hpp", KERNELS / "conditioning.cu", HERE / "conditioning_cpu.hpp"]
RUNS = cpp.COMPILER is not None and sys.platform.startswith("linux")
"""The emulation needs g++, and ucontext as Linux has it."""


def _argument(x):
    if x is None or isinstance(x, torch.Tensor):
        return ctypes.c_void_p(None if x is None else x.data_ptr())
    return ctypes.byref(x) if isinstance(x, ctypes.Structure) else x


class CPULaunches:
    """``conditioning._launch`` by the kernels' own source, compiled for a CPU.

    ``seed``: of the order of threads. ``some``: of a launch by name, the blocks that run, else all do. ``launched``:
    names.
    """

    def __init__(self, folder):
        self.source, self.libraries = folder / "kernel.cpp", {}
        self.seed, self.some, self.launched = 0, {}, []
        self.source.write_text("".join(f'#include "{part}"\n' for part in PARTS))

    def __call__(self, name, shape, device, blocks, arguments):
        assert device.type == "cpu"
        if shape not in self.libraries:
            macros = tuple(f"-D{macro}={value}" for macro, value in shape.defines(dependent=True).items())
            path = self.source.with_name(f"kernel{len(self.libraries)}.so")
            self.libraries[shape] = cpp.library(self.source, macros, path)
        run = getattr(self.libraries[shape], f"{name}_on_cpu")
        first, last = self.some.get(name, (0, blocks))
        run(first, last, shape.shared_bytes()[name], self.seed, *map(_argument, arguments))
        self.launched.append(name)


def launches_in(monkeypatch, launches):
    """Have ``launches`` stand in for the device's; results begin as NaN."""
    empty = torch.empty

    def nan(*sizes, **how):
        made = empty(*sizes, **how)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(conditioning, "_launch", launches)
    monkeypatch.setattr(torch, "empty", nan)
    return launches
