"""A whole run on a GPU: kernels that are MX's own, captured frames, every figure there."""

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("no_flags", "fresh_compiler"),
]
WORDS = ("model=smoke", "trainer=gpu", "compile=on", "data.limit=2", "data.future_frames=6", "measure.videos=false")


@pytest.mark.parametrize("attention", ["fused", "sdpa"])
@pytest.mark.parametrize("quant", ["mxfp8_all", "mxfp4_mlp"])
def test_both_arms_run_captured_and_are_measured(record, quant, attention):
    found = record(*WORDS, f"quant={quant}", "kv=mx_v_only", f"attention={attention}")
    assert found.status == "complete"
    transform = found.arms["candidate"].transform
    assert not transform.emulated
    assert transform.count > 0
    for arm in found.arms.values():
        assert arm.compile.cuda_graph
        assert (arm.compile.graph_breaks, arm.compile.recompiles_after_warmup) == (0, 0)
        assert arm.speed.pipeline_fps > 0
        assert arm.parts.ms["mlp"].median > 0
        assert arm.memory.peak_allocated > 0
    assert found.quality.all.fidelity.psnr > 20
    errors = [layer.rel for layer in found.arms["candidate"].numerics.layers.values()]
    assert len(errors) == transform.count
    assert all(0 < error < 0.2 for error in errors)


def test_formats_that_quantise_activations_run_captured_too(record):
    found = record(*WORDS, "quant=mxfp8_all", "quant.activation=mx", "kv=mx_kv", "attention=fused")
    assert found.status == "complete"
    assert found.arms["candidate"].compile.recompiles_after_warmup == 0
    assert found.quality.all.fidelity.psnr > 20
