import torch
from torch import nn

from harness.measure.memory import AllocationMeter, PeakProbe, module_bytes, process_peak_rss, storage_bytes


def test_module_bytes_are_parameters_and_buffers():
    layer = nn.Linear(8, 4, dtype=torch.bfloat16)
    layer.register_buffer("scale", torch.zeros(3))
    assert module_bytes(layer) == (8 * 4 + 4) * 2 + 3 * 4


def test_views_and_shared_tensors_count_once():
    base = torch.zeros(10)
    assert storage_bytes([base, base[:5], base.view(2, 5)]) == 40


def test_quantised_subclasses_count_as_packed():
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    weight = torch.randn(32, 64, dtype=torch.bfloat16)
    packed = MXTensor.to_mx(weight, torch.float8_e4m3fn, 32)
    assert storage_bytes([packed]) == 32 * 64 + 32 * 64 // 32


def test_a_cpu_reports_its_resident_peak_and_no_gpu_figures():
    probe = PeakProbe(torch.device("cpu"))
    with probe:
        torch.zeros(1000)
    result = probe.result()
    assert result.peak_allocated is None
    assert result.transient is None
    assert result.process_peak_rss == process_peak_rss() > 10_000_000
    assert AllocationMeter(torch.device("cpu")).taken() is None
