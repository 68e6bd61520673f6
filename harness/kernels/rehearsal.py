"""Kernels of ours compiled side by side, before the first of them is launched.

A rehearsal runs the host's code as it is, on the tensors that it will have, but launches nothing: what would be
launched is compiled, by threads, and tensors that it would have filled hold anything. So no list of kernels, and of
what they are compiled for, stands beside the code that launches them. Whoever launches a kernel that is still being
compiled waits for it. NVRTC, and Triton for five sixths of its time, let other threads have Python's lock.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


class _Here(threading.local):
    pool: Executor | None = None


_here = _Here()
_jobs: dict[tuple[object, ...], Future[None]] = {}
"""Triton kernels that are being compiled, or are: module, name, device, and what they are compiled for."""

_begun: list[Future[Any]] = []
_first = threading.Lock()


def rehearsing() -> bool:
    """Whether this thread rehearses."""
    return _here.pool is not None


def compiled(make: Callable[[], bytes]) -> bytes | Future[bytes]:
    """``make()``; in a rehearsal, what a thread will have made."""
    return make() if _here.pool is None else _begin(_here.pool, make)


def finish() -> None:
    """Wait until all that was begun is compiled: what is timed has the machine to itself."""
    begun, _begun[:] = _begun[:], []
    wait(begun)


def _begin(pool: Executor, work: Callable[..., Result], *arguments: Any) -> Future[Result]:
    _begun.append(pool.submit(work, *arguments))
    return _begun[-1]


@contextmanager
def rehearsal() -> Iterator[None]:
    """Within it, kernels that this thread would launch are compiled by others, which go on when it has ended.

    A Triton kernel that is compiled already is launched.
    """
    _hook_into_triton()
    before, pool = _here.pool, ThreadPoolExecutor(thread_name_prefix="rehearsal")
    _here.pool = pool
    try:
        yield
    finally:
        _here.pool = before
        pool.shutdown(wait=False)


def _hook_into_triton() -> None:
    """Have Triton ask us before it compiles what a launch needs, and whoever else it asked."""
    try:
        from triton import knobs
    except ImportError:  # none of its kernels are launched then
        return
    asked: Any = knobs.runtime.jit_cache_hook
    if getattr(asked, "__name__", None) == "missed_by_us":
        return

    def missed_by_us(**call: Any) -> bool:
        return (asked is not None and bool(asked(**call))) or _missed(**call)

    knobs.runtime.jit_cache_hook = missed_by_us  # type: ignore[assignment]


def _missed(*, fn: Any, compile: dict[str, Any], is_manual_warmup: bool, **_: Any) -> bool:
    """Triton's ``jit_cache_hook``: whether a kernel that is not there yet is neither compiled nor launched now."""
    if is_manual_warmup or any(_is_changed_by_text(value) for value in compile["constants"].values()):
        return False  # asked for by a thread of ours, or no other than the launch can compile it
    kernel = (fn.module, fn.name, compile["device"], compile["key"])
    if _here.pool is None:
        if kernel in _jobs:
            wait([_jobs[kernel]])  # what it compiled is found on disk; what went wrong goes wrong again, and is told
        return False
    if kernel not in _jobs:
        given = fn.jit_function, compile["device"], compile["specialization_data"]
        _jobs[kernel] = _begin(_here.pool, _compile, *given)
    return True


def _is_changed_by_text(constant: Any) -> bool:
    """Whether ``preload`` makes something else of a constant: of the name of a Triton type it makes the type."""
    dtype: Any = importlib.import_module("triton.language").dtype
    return isinstance(constant, str) and bool(dtype.is_dtype(constant))


def _compile(kernel: Any, device: int, specialization: str) -> None:
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(device)
    with _first:  # what names Triton itself takes a second, and is then known to all
        importlib.import_module("triton.runtime.cache").triton_key()
    made = kernel.preload(specialization)
    if on_gpu:
        made.run  # noqa: B018  loads it and builds what launches it, for which Triton runs a C compiler
