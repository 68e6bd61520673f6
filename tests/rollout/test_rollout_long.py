"""A rollout of a thousand frames and more holds as much memory at its end as at its start, and traces nothing new."""

import gc
from pathlib import Path

import pytest
import torch
from rollout_cases import make_core, make_inputs, make_rollout

from harness.kv import KVConf, KVStorage
from harness.rollout import CompileCounters, SamplerConf

FRAMES = 1100
SETTLED = 100
"""Frames after which allocator and caches hold what they will hold."""


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def tensors():
    gc.collect()
    return sum(isinstance(one, torch.Tensor) for one in gc.get_objects())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory of the process from Linux's /proc")
@pytest.mark.parametrize("kv", [KVConf(), KVConf(storage=KVStorage.mx, quantize_k=True)], ids=["bf16", "mx"])
def test_a_thousand_frames_grow_neither_memory_nor_traces(kv):
    core = make_core(n_layers=1)
    rollout = make_rollout(core, SamplerConf(window=4, timesteps=[1.0]), kv, enabled=True, backend="eager")
    assert rollout.warmup().graphs > 0
    context, inputs = make_inputs(core, 8)
    rollout.prefill(*context)
    counted, held = CompileCounters(), None
    for frame in range(FRAMES):
        latent = rollout.next_frame(*inputs[frame % len(inputs)])
        if frame == SETTLED:
            held = tensors(), resident_bytes()
    grown = resident_bytes() - held[1]  # first: to count tensors, every object of the process is listed
    assert torch.isfinite(latent).all()
    assert (counted.graphs, counted.graph_breaks) == (0, 0)
    assert tensors() == held[0]
    assert grown < 4 << 20
