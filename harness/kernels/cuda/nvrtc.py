"""Compiles CUDA C++ at run time and launches it on torch's current stream. Knows nothing of MX.

Compiling goes through NVRTC, which torch's CUDA builds bring with the package cuda-bindings; loading and launching
through the CUDA driver (libcuda), called with ctypes: cuda-bindings 13.0 does not align tensor maps as the driver
demands. Nothing here waits for the device.
"""

import ctypes
import functools
import importlib.util
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from harness.kernels import cache, rehearsal

_BFLOAT16, _SWIZZLE_128B, _PROMOTE_L2_128B = 9, 3, 2  # CUtensorMapDataType, CUtensorMapSwizzle, CUtensorMapL2promotion
_MAX_DYNAMIC_SHARED = 8  # CUfunction_attribute
_CLUSTER_DIMENSION, _PROGRAMMATIC_STREAM_SERIALIZATION = 4, 6  # CUlaunchAttributeID

_loading = threading.Lock()


class CompileError(RuntimeError):
    """NVRTC refused the source; the message is its log."""


class DriverError(RuntimeError):
    """The CUDA driver refused what was asked of it."""


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint64 * 8))


class _LaunchConfig(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    )


class TensorMap:
    """How the bulk copy engine reads boxes of a BF16 matrix into swizzled shared memory; zeros beyond its edges."""

    def __init__(self, x: Tensor, box_rows: int, box_columns: int) -> None:
        """``x`` BF16 [M, K], contiguous, at a multiple of 16 bytes; K a multiple of 8."""
        self._memory = (ctypes.c_uint8 * 192)()
        start = ctypes.addressof(self._memory)
        self.address = start + -start % 64
        rows, columns = x.shape
        _check(
            _driver().cuTensorMapEncodeTiled(
                ctypes.c_void_p(self.address),
                _BFLOAT16,
                2,
                ctypes.c_void_p(x.data_ptr()),
                (ctypes.c_uint64 * 2)(columns, rows),
                (ctypes.c_uint64 * 1)(columns * 2),
                (ctypes.c_uint32 * 2)(box_columns, box_rows),
                (ctypes.c_uint32 * 2)(1, 1),
                0,
                _SWIZZLE_128B,
                _PROMOTE_L2_128B,
                0,
            ),
            f"describing x {tuple(x.shape)} at {x.data_ptr():#x} for TMA",
        )


class Function:
    """A kernel on a device. Takes ctypes values, tensors (their addresses), None (a null pointer), TensorMaps."""

    def __init__(self, cubin: bytes | Future[bytes], name: str, shared_bytes: int) -> None:
        """Load ``cubin`` into the current device's context, for launches with ``shared_bytes`` of shared memory.

        One that is still being compiled is waited for, and loaded, when it is first launched.
        """
        self._cubin, self._name, self._shared_bytes = cubin, name, shared_bytes
        self._handle: ctypes.c_void_p | None = None
        if isinstance(cubin, bytes):
            self._load(cubin)

    def _load(self, cubin: bytes) -> None:
        name, shared_bytes, handle, module = self._name, self._shared_bytes, ctypes.c_void_p(), ctypes.c_void_p()
        _check(_driver().cuModuleLoadData(ctypes.byref(module), cubin), f"loading {name}")
        _check(_driver().cuModuleGetFunction(ctypes.byref(handle), module, name.encode()), f"finding {name}")
        _check(
            _driver().cuFuncSetAttribute(handle, _MAX_DYNAMIC_SHARED, shared_bytes),
            f"{shared_bytes} bytes of shared memory for {name}",
        )
        self._handle = handle

    def launch(self, grid: tuple[int, int], threads: int, arguments: Sequence[Any], dependent: bool = False) -> None:
        """Queue the kernel on torch's current stream; in a rehearsal, do nothing.

        ``dependent``: as programmatic dependent launch, see ``harness.kernels.launch``.
        Raises DriverError when the driver refuses.
        """
        if rehearsal.rehearsing():
            return
        self.prepared(grid, threads, arguments, dependent)(torch.cuda.current_stream().cuda_stream)

    def clusters_at_once(self, threads: int, cluster: int) -> int:
        """How many clusters of so many blocks the device runs at the same time: that depends on the single GPU."""
        size = 1 << 32 | cluster, 1  # x, y and z, of 32 bits
        attribute = _Attribute(_CLUSTER_DIMENSION, 0, (ctypes.c_uint64 * 8)(*size))
        grid, block = (ctypes.c_uint * 3)(cluster, 1, 1), (ctypes.c_uint * 3)(threads, 1, 1)
        config = _LaunchConfig(grid, block, self._shared_bytes, None, ctypes.pointer(attribute), 1)
        found = ctypes.c_int()
        result = _driver().cuOccupancyMaxActiveClusters(ctypes.byref(found), self._handle, ctypes.byref(config))
        _check(result, f"counting clusters of {cluster} blocks of {self._name}")
        return found.value

    def prepared(
        self, grid: tuple[int, int], threads: int, arguments: Sequence[Any], dependent: bool = False
    ) -> Callable[..., bool]:
        """:meth:`launch` for many times over: a function of a stream's handle, and of a CUresult to return False for.

        It returns True, and raises DriverError for any other result. Arguments that are ctypes values may be given
        others in between.
        """
        with _loading:
            if self._handle is None:
                assert isinstance(self._cubin, Future)
                self._load(self._cubin.result())
        kept = [_pointer(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(kept))(*(address for address, _ in kept))
        attribute = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, (ctypes.c_uint64 * 8)(1))
        config = _LaunchConfig(
            (ctypes.c_uint * 3)(*grid, 1),
            (ctypes.c_uint * 3)(threads, 1, 1),
            self._shared_bytes,
            None,
            ctypes.pointer(attribute),
            int(dependent),
        )
        launch, config_at = _driver().cuLaunchKernelEx, ctypes.byref(config)
        memory = kept, attribute  # that the driver is pointed to

        def run(stream: int, refusal: int = 0) -> bool:
            config.stream = stream
            assert memory
            result = launch(config_at, self._handle, pointers, None)
            if result == 0:
                return True
            if result != refusal:
                _check(result, f"launching {self._name} on {grid} blocks of {threads} threads")
            return False

        return run


def unavailable() -> str | None:
    """Why CUDA C++ cannot be compiled at run time here, or None."""
    try:
        found = importlib.util.find_spec("cuda.bindings")
    except ModuleNotFoundError:
        found = None
    if found is None:
        return "the package cuda-bindings is not installed (torch's CUDA builds for Linux bring it)"
    from cuda.bindings import nvrtc  # only where it is installed

    try:
        nvrtc.nvrtcVersion()
    except RuntimeError as error:
        return f"cuda-bindings finds no NVRTC library ({error}); torch's CUDA builds bring nvidia-cuda-nvrtc"
    return None


def compile_source(source: str, name: str, defines: Mapping[str, int], architecture: str) -> bytes:
    """A cubin of CUDA C++ ``source`` for ``architecture``, such as sm_90a, kept on disk (``harness.kernels.cache``).

    Other threads run meanwhile. Raises CompileError with the compiler's log.
    """
    from cuda.bindings import nvrtc

    options = [f"--gpu-architecture={architecture}", "--std=c++17", *(f"-D{k}={v}" for k, v in defines.items())]
    key = cache.key_of([source, *options, *(str(part) for part in nvrtc.nvrtcVersion())])
    kept = cache.read_cubin(key)
    if kept is None:
        kept = _compile(source, name, options)
        cache.write_cubin(key, kept)
    return kept


def _compile(source: str, name: str, options: list[str]) -> bytes:
    from cuda.bindings import nvrtc

    def checked(result: tuple) -> Any:
        if result[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(f"NVRTC: {result[0].name} in {name}")
        return result[1] if len(result) > 1 else None

    program = checked(nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), 0, [], []))
    try:
        result = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if result[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program))
            checked(nvrtc.nvrtcGetProgramLog(program, log))
            raise CompileError(f"NVRTC cannot compile {name} with {' '.join(options)}:\n{log.decode()}")
        cubin = b" " * checked(nvrtc.nvrtcGetCUBINSize(program))
        checked(nvrtc.nvrtcGetCUBIN(program, cubin))
        return cubin
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _pointer(argument: Any) -> tuple[int, Any]:
    """Where the driver finds ``argument``, and what must stay alive until it has looked."""
    if isinstance(argument, TensorMap):
        return argument.address, argument
    if argument is None or isinstance(argument, Tensor):
        argument = ctypes.c_void_p(None if argument is None else argument.data_ptr())
    return ctypes.addressof(argument), argument


@functools.cache
def _driver() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    library.cuTensorMapEncodeTiled.argtypes = (
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_uint32,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
    )
    return library


def _check(result: int, what: str) -> None:
    if result != 0:
        message = ctypes.c_char_p()
        _driver().cuGetErrorString(result, ctypes.byref(message))
        text = (message.value or b"unknown error").decode()
        raise DriverError(f"CUDA driver, {what}: {text} ({result})")
