"""Compiling the parts of a frame, capturing a whole frame in a CUDA graph, and counting what compilation did."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from harness.kernels.rehearsal import rehearsing
from harness.rollout.conf import BACKENDS, LINEARS, MODES, SCOPES, CompileConf

Function = TypeVar("Function", bound=Callable[..., Any])
Params = ParamSpec("Params")
Result = TypeVar("Result")


def validate(conf: CompileConf, device: torch.device) -> None:
    """Check ``conf`` against the device that frames will run on.

    Raises:
        ValueError: naming every field that is out of range, contradicts another or cannot run on ``device``.
    """
    problems = []
    if conf.mode not in MODES:
        problems.append(f"mode={conf.mode!r}: allowed are {', '.join(MODES)}")
    if conf.linears not in LINEARS:
        problems.append(f"linears={conf.linears!r}: allowed are {', '.join(LINEARS)}")
    if conf.scope not in (None, *SCOPES):
        problems.append(f"scope={conf.scope!r}: allowed are {', '.join(SCOPES)}")
    if conf.enabled and conf.scope == "block" and conf.mode == "reduce-overhead":
        problems.append("scope=block with mode=reduce-overhead, which would capture each layer; use mode=default")
    if conf.backend not in BACKENDS:
        problems.append(f"backend={conf.backend!r}: allowed are {', '.join(BACKENDS)}")
    if conf.options and conf.backend != "inductor":
        problems.append(f"options with backend={conf.backend}: they are Inductor's; drop them or use backend=inductor")
    if conf.options.get("triton.enable_pdl"):
        problems.append(
            "options: triton.enable_pdl lets Inductor's kernels begin early on terms that ours do not keep "
            "(harness/kernels/launch.py); leave it out"
        )
    unknown = sorted(set(conf.options) - set(torch._inductor.list_options())) if conf.options else []
    if unknown:
        problems.append(f"options: Inductor has no {', '.join(unknown)}; see torch._inductor.list_options()")
    if conf.cuda_graph and device.type != "cuda":
        problems.append(f"cuda_graph=true on {device.type}: CUDA graphs need a CUDA device; use cuda_graph=null")
    if conf.overlap_decode and device.type != "cuda":
        problems.append(
            f"overlap_decode=true on {device.type}: it needs CUDA streams; use overlap_decode=false, or trainer=gpu"
        )
    if conf.enabled and conf.mode == "reduce-overhead" and device.type != "cuda":
        problems.append(f"mode=reduce-overhead on {device.type}: it is about CUDA graphs; use mode=default")
    if conf.cuda_graph and conf.enabled and conf.mode == "reduce-overhead":
        problems.append("cuda_graph=true with mode=reduce-overhead, which captures graphs itself; choose one of them")
    if problems:
        raise ValueError("compile config: " + "; ".join(problems))


def without_grad(function: Callable[Params, Result]) -> Callable[Params, Result]:
    """Run ``function`` without gradients, but not in inference mode, whose tensors compiled code tells from others.

    A context is entered where it changes something: entering both takes as long as launching a kernel.
    """

    @functools.wraps(function)
    def wrapped(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                return function(*args, **kwargs)
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        with torch.no_grad():
            return function(*args, **kwargs)

    return wrapped


def compile_function(function: Function, conf: CompileConf, tune: bool = True) -> Function:
    """``function`` compiled as ``conf`` says (itself if compilation is off); a graph break is an error.

    ``function`` is a plain Python function. Its code object is copied first: the compiler keeps its results per code
    object and gives up after a few, so that two arms of a run, or a sweep in one process, would count as recompiles
    of one another. Inductor is imported when it is first called. In a rehearsal (:mod:`harness.kernels.rehearsal`) it
    runs as it is.

    ``tune``: whether Inductor tries several launch shapes of each kernel, all of which it compiles.
    """
    if not conf.enabled:
        return function

    @functools.cache
    def compiled() -> Callable[..., Any]:
        return _compiled(function, conf, tune)

    def run(*args: Any) -> Any:
        return function(*args) if rehearsing() else compiled()(*args)

    return run  # type: ignore[return-value]


def _compiled(function: Function, conf: CompileConf, tune: bool) -> Function:
    own = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    options = None
    if conf.backend == "inductor":  # a mode is a set of options; torch.compile takes one or the other
        options = {"triton.enable_pdl": False, **torch._inductor.list_mode_options(conf.mode)}
        if not tune:
            options["triton.autotune_pointwise"] = False
        options |= conf.options
    return torch.compile(own, fullgraph=True, dynamic=False, options=options, backend=conf.backend)  # type: ignore[return-value]


def keep_in_place(buffers: list[Tensor], conf: CompileConf) -> None:
    """Tell the CUDA graphs of mode=reduce-overhead that ``buffers`` are mutated in place and never move.

    Without this such code would be run without graphs, or would copy the buffers in and out every time.
    """
    if conf.enabled and conf.mode == "reduce-overhead":
        for buffer in buffers:
            torch._dynamo.mark_static_address(buffer)


def begin_frame(conf: CompileConf) -> None:
    """Tell the CUDA graphs of mode=reduce-overhead that the last frame's results are no longer needed."""
    if conf.enabled and conf.mode == "reduce-overhead":
        torch.compiler.cudagraph_mark_step_begin()


class CompileCounters:
    """Graphs compiled and graph breaks in this process since the object was made.

    Made after warm-up, its ``graphs`` are recompiles.
    """

    def __init__(self) -> None:
        self._graphs, self._breaks = _compiled_so_far()

    @property
    def graphs(self) -> int:
        """Graphs compiled since."""
        return _compiled_so_far()[0] - self._graphs

    @property
    def graph_breaks(self) -> int:
        """Graph breaks since."""
        return _compiled_so_far()[1] - self._breaks


def _compiled_so_far() -> tuple[int, int]:
    if "torch._dynamo.utils" not in sys.modules:  # it takes a second to import, and comes with what is compiled
        return 0, 0
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


class CapturedGraph(Generic[Result]):
    """A function of no arguments, captured once in a CUDA graph and replayed.

    It must read and write fixed buffers only, and never wait for the device. Construction runs it ``warmups`` times
    for real, outside the graph (compilation, autotuning and library workspaces may not happen inside); capturing
    itself executes nothing.

    Args:
        function: what to capture.
        device: the CUDA device it runs on.
        warmups: runs before the capture.
    """

    def __init__(self, function: Callable[[], Result], device: torch.device, warmups: int = 3) -> None:
        with torch.cuda.device(device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(warmups):
                    function()
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._result = function()

    def replay(self) -> Result:
        """Run once more; the result's tensors are the same ones every time, valid until the next replay."""
        self._graph.replay()
        return self._result
