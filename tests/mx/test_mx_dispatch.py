import importlib.util

import pytest
import torch

from harness.formats.mx import E2M1, E4M3, E5M2
from harness.formats.scales import ScaleMode
from harness.mx.conf import Activation, KernelChoice
from harness.mx.dispatch import KERNELS, available_kernels, resolve_kernel
from harness.mx.linears import native
from harness.mx.linears.base import LinearFormat

CPU = torch.device("cpu")
W8A16 = LinearFormat(E4M3, ScaleMode.rceil, Activation.bf16)
W8A8 = LinearFormat(E4M3, ScaleMode.rceil, Activation.mx)


@pytest.mark.parametrize("fmt", [W8A16, W8A8], ids=["W8A16", "W8A8"])
def test_on_the_cpu_auto_is_emulated_and_says_so(fmt):
    kernel = resolve_kernel(KernelChoice.auto, CPU, fmt)
    assert kernel.name == "emulated"
    assert kernel.emulated


def test_every_kernel_a_user_can_name_has_a_verdict():
    verdicts = available_kernels(CPU, W8A16)
    assert set(verdicts) == {"cutlass", "cuda", "triton", "emulated"}
    assert verdicts["emulated"] == "ok"


@pytest.mark.parametrize("choice", ["cutlass", "cuda", "triton"])
@pytest.mark.parametrize("fmt", [W8A16, W8A8], ids=["W8A16", "W8A8"])
def test_a_kernel_that_cannot_run_is_an_error_that_names_what_can(choice, fmt):
    with pytest.raises(ValueError, match=rf"kernel={choice} cannot run W8A.* on cpu \(.*{choice}: ") as caught:
        resolve_kernel(KernelChoice(choice), CPU, fmt)
    assert "Use kernel=emulated" in str(caught.value)


@pytest.mark.parametrize(
    ("capability", "bits", "runs"),
    [
        ((8, 0), 8, False),
        ((9, 0), 8, False),
        ((9, 0), 4, False),
        ((10, 0), 8, True),
        ((10, 0), 4, True),
        ((10, 3), 4, True),
        ((12, 0), 8, True),
        ((12, 0), 4, False),
    ],
)
def test_where_the_native_path_runs(capability, bits, runs):
    reason = native.unavailable_on(capability, bits)
    assert (reason is None) == runs
    assert runs or f"sm_{capability[0]}{capability[1]}" in reason


@pytest.fixture
def blackwell(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    return torch.device("cuda", 0)


@pytest.mark.parametrize(("triton", "weight_only"), [(True, "triton"), (False, "emulated")])
def test_on_blackwell_auto_takes_the_native_path_for_mx_activations_only(blackwell, monkeypatch, triton, weight_only):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: triton or None)
    assert resolve_kernel(KernelChoice.auto, blackwell, W8A8).name == "cutlass"
    assert resolve_kernel(KernelChoice.auto, blackwell, W8A16).name == weight_only
    assert "needs activation=mx" in available_kernels(blackwell, W8A16)["cutlass"]


def test_the_native_path_has_no_e5m2(blackwell):
    assert "not E5M2" in available_kernels(blackwell, LinearFormat(E5M2, ScaleMode.rceil, Activation.mx))["cutlass"]
    assert available_kernels(blackwell, LinearFormat(E2M1, ScaleMode.rceil, Activation.mx))["cutlass"] == "ok"


def test_the_native_path_names_a_width_it_cannot_take():
    cutlass = next(k for k in KERNELS if k.name == "cutlass")
    assert cutlass.unfit(torch.nn.Linear(64, 48)) is None
    assert "out_features=40 is not a multiple of 16" in cutlass.unfit(torch.nn.Linear(64, 40))
