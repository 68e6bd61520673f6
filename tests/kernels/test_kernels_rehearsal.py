"""Kernels are compiled by threads while host code runs as if it launched them."""

import ctypes
import importlib.util
import os
import subprocess
import sys
import threading
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness.kernels import rehearsal
from harness.kernels.cuda import nvrtc

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is not installed")
def test_triton_kernels_are_compiled_once_for_what_the_launch_itself_needs():
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("rehearsal_for_hopper.py")
    places = os.pathsep.join([str(ROOT), inherited.get("PYTHONPATH", "")])
    run = [sys.executable, str(script)]
    done = subprocess.run(run, env=inherited | {"PYTHONPATH": places}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["residual_norm_kernel", *["window_kernel"] * 3]


@pytest.fixture
def driver(monkeypatch):
    """A CUDA driver that notes what is loaded and launched."""
    seen = []

    class Driver:
        def cuModuleLoadData(self, module, cubin):
            seen.append(cubin)
            return 0

        def cuModuleGetFunction(self, *_):
            return 0

        def cuFuncSetAttribute(self, *_):
            return 0

        def cuLaunchKernelEx(self, *_):
            seen.append("launched")
            return 0

    monkeypatch.setattr(nvrtc, "_driver", Driver)
    return seen


def test_a_cuda_kernel_is_compiled_by_another_thread_and_loaded_when_it_is_launched(driver):
    compiling, may_go_on = [], threading.Event()

    def make():
        compiling.append(threading.current_thread())
        assert may_go_on.wait(60)
        return b"cubin"

    with rehearsal.rehearsal():
        function = nvrtc.Function(rehearsal.compiled(make), "kernel", 0)
        function.launch((1, 1), 32, [ctypes.c_int(1)])
    assert driver == []
    may_go_on.set()
    launch = function.prepared((1, 1), 32, [ctypes.c_int(1)])
    assert driver == [b"cubin"]
    assert launch(0)
    function.prepared((1, 1), 32, [])
    assert driver == [b"cubin", "launched"]
    assert compiling != [threading.current_thread()]


def test_what_is_timed_waits_for_all_that_was_begun():
    done, may_go_on = [], threading.Event()

    def make():
        assert may_go_on.wait(60)
        done.append(True)
        return b"cubin"

    with rehearsal.rehearsal():
        rehearsal.compiled(make)
    assert not done
    may_go_on.set()
    rehearsal.finish()
    assert done


def test_without_a_rehearsal_it_is_compiled_and_loaded_at_once(driver):
    nvrtc.Function(rehearsal.compiled(lambda: b"cubin"), "kernel", 0)
    assert driver == [b"cubin"]


def test_what_a_compiler_refused_is_told_where_it_is_launched(driver):
    refused = Future()
    refused.set_exception(nvrtc.CompileError("no"))
    function = nvrtc.Function(refused, "kernel", 0)
    with pytest.raises(nvrtc.CompileError, match="no"):
        function.prepared((1, 1), 32, [])


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is not installed")
@pytest.mark.parametrize(("constant", "kept"), [("i8", True), ("e4m3", True), ("int8", False), (3, True)])
def test_a_kernel_whose_constants_triton_would_read_back_as_something_else_is_not_compiled_ahead(constant, kept):
    """`preload` makes of a text that names a type the type: a kernel that compares it with the text is another."""
    call = {"device": 0, "key": str(constant), "constants": {(0,): constant}, "specialization_data": ""}
    function = SimpleNamespace(module="module", name=f"kernel {constant}", jit_function=None)
    with rehearsal.rehearsal():
        missed = rehearsal._missed(fn=function, compile=call, is_manual_warmup=False)
    assert missed is kept


def test_a_rehearsal_is_that_of_its_thread():
    found = []
    with rehearsal.rehearsal():
        thread = threading.Thread(target=lambda: found.append(rehearsal.rehearsing()))
        thread.start()
        thread.join()
    assert found == [False]
