"""On a GPU: the same bits as on a CPU, run plainly and replayed from a CUDA graph."""

import pytest
import torch
from kv_cases import STORAGES, WINDOWS, B, H, P, W, frames_of, make_cache, prefill

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
BF16 = torch.bfloat16


def frame(cache, k, v):
    cache.advance()
    windows = [tuple(x.clone() for x in cache.window(layer, k, v)) for layer in range(len(WINDOWS))]
    for layer in range(len(WINDOWS)):
        cache.store(layer, k, v)
    return windows


def both(conf):
    cpu, gpu = make_cache(conf, dtype=BF16), make_cache(conf, dtype=BF16, device="cuda")
    for cache in (cpu, gpu):
        gen = torch.Generator().manual_seed(0)
        for layer in range(len(WINDOWS)):
            cache.load(layer, *(x.to(cache.device) for x in frames_of(W, gen, dtype=BF16)))
    return cpu, gpu


@pytest.mark.parametrize("conf", STORAGES.values(), ids=STORAGES)
def test_same_bits_as_on_a_cpu(gen, conf):
    cpu, gpu = both(conf)
    for _ in range(W + 2):
        own = frames_of(1, gen, dtype=BF16)
        for want, got in zip(frame(cpu, *own), frame(gpu, *(x.cuda() for x in own)), strict=True):
            assert all(torch.equal(a, b.cpu()) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("conf", STORAGES.values(), ids=STORAGES)
def test_a_cuda_graph_replays_stores_and_moving_averages(gen, conf):
    cpu, gpu = both(conf)
    k, v = (torch.zeros(B, H, P, 32, dtype=BF16, device="cuda") for _ in "kv")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        frame(gpu, k, v)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        windows = frame(gpu, k, v)
    prefill((cpu, _OnCuda(gpu)), WINDOWS, W, gen, dtype=BF16)
    for _ in range(W + 2):
        own = frames_of(1, gen, dtype=BF16)
        k.copy_(own[0])
        v.copy_(own[1])
        graph.replay()
        for want, got in zip(frame(cpu, *own), windows, strict=True):
            assert all(torch.equal(a, b.cpu()) for a, b in zip(want, got, strict=True))


class _OnCuda:
    """A cache on the GPU that is loaded from CPU tensors."""

    def __init__(self, cache):
        self.cache = cache

    def load(self, layer, k, v):
        self.cache.load(layer, k.cuda(), v.cuda())
