"""A quantised cache needs less memory at its peak, not only on paper: no BF16 copies, little room to work in."""

import gc

import pytest
import torch
from kv_cases import STORAGES
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness.kv import KVCache, KVConf

HEADS, TOKENS, HEAD_DIM, BF16 = 2, 64, 32, torch.bfloat16


class LivePeak(TorchDispatchMode):
    """Most bytes alive at once of the storages that operators returned, within the context."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.live[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {at: (ref, size) for at, (ref, size) in self.live.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


def use(conf, windows, device="cpu"):
    """A cache through a prefill and two frames of two steps; K and V come and go as a model's would."""
    cache = KVCache(len(windows), 1, HEADS, HEAD_DIM, TOKENS, windows, conf, BF16, device)
    longest = max(windows)
    for layer in range(len(windows)):
        cache.load(layer, *(torch.ones(1, HEADS, longest * TOKENS, HEAD_DIM, dtype=BF16, device=device) for _ in "kv"))
    for _frame in range(2):
        cache.advance()
        own = torch.ones(1, HEADS, TOKENS, HEAD_DIM, dtype=BF16, device=device)
        for _step in range(2):
            for layer in range(len(windows)):
                cache.window(layer, own, own)
        for layer in range(len(windows)):
            cache.store(layer, own, own)
    return cache


def peak_of(conf, windows):
    with LivePeak() as meter:
        cache = use(conf, windows)
    return meter.peak, cache.nbytes()


WINDOWS = [8, 8, 8, 24] * 3
"""Of a model like the demo's: three local layers for each global one."""


@pytest.mark.parametrize(
    ("name", "share"),
    [("i8", 0.80), ("mx_v", 0.90), ("mx_kv", 0.80), ("mx4_kv", 0.57), ("ema", 0.80), ("i8_k_mx4_v", 0.92)],
)
def test_peak_falls_with_the_window(name, share):
    """The peak includes one layer's K and V as prefill makes them, and whatever encoding and decoding need."""
    plain, _ = peak_of(KVConf(), WINDOWS)
    quantised, size = peak_of(STORAGES[name], WINDOWS)
    assert quantised < share * plain
    assert size.peak < size.plain


@pytest.mark.parametrize("name", STORAGES)
def test_the_peak_is_what_the_cache_says(name):
    """Nothing of a window's size is made beside it; only the indices of 4-bit values and the scales as numbers are."""
    windows = [24] * 4
    with LivePeak() as meter:
        cache = use(STORAGES[name], windows)
        gc.collect()
        meter.peak = 0
        own = torch.ones(1, HEADS, TOKENS, HEAD_DIM, dtype=BF16)
        cache.advance()
        for layer in range(len(windows)):
            cache.window(layer, own, own)
        for layer in range(len(windows)):
            cache.store(layer, own, own)
    size, ring = cache.nbytes(), HEADS * 24 * TOKENS * HEAD_DIM
    slack = ring // 2 + ring // 16 if size.dequantised_per_step else 0
    assert size.peak == size.allocated + size.scratch
    assert size.peak <= meter.peak <= size.peak + slack + 10 * own.nbytes


def test_few_layers_gain_little():
    """The room to dequantise into costs one layer's window: with two equal layers 8 bits gain nothing at the peak."""
    size = use(STORAGES["mx_kv"], [24, 24]).nbytes()
    assert size.allocated < 0.52 * size.plain
    assert size.peak > size.plain


def test_scratch_is_the_largest_quantised_ring_of_each():
    late = KVConf(storage=STORAGES["mx_v"].storage, late_layers=1)
    size = use(late, [24, 8]).nbytes()
    assert size.scratch == HEADS * 8 * TOKENS * HEAD_DIM * 2, "V alone, and only the layer that is quantised"


@pytest.mark.parametrize("name", STORAGES)
def test_allocated_is_computed(name):
    size = use(STORAGES[name], WINDOWS).nbytes()
    assert size.allocated == size.computed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", ["i8", "mx_kv", "mx4_kv", "ema"])
def test_peak_falls_on_a_gpu(name):
    def peak(conf):
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        cache = use(conf, [64] * 24, "cuda")
        torch.cuda.synchronize()
        del cache
        return torch.cuda.max_memory_allocated() - before

    assert peak(STORAGES[name]) < 0.8 * peak(KVConf())
