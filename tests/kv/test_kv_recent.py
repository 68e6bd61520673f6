"""The newest frames of a 4-bit ring, kept in 8 bits as well."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from harness.ab.fallback import fallbacks
from harness.calib.sequences import layer_cache_conf
from harness.kv import KVCache, KVConf, KVStorage, describe, validate
from harness.kv.conf import KVFormat
from harness.mx.conf import MXConf
from harness.rollout.attention import check_storage
from harness.rollout.conf import AttentionKind

HEADS, TOKENS, DIM = 2, 4, 32
MX = KVStorage.mx
FOUR = KVConf(MX, quantize_k=True, bits=4)
EIGHT = KVConf(MX, quantize_k=True, k_format=KVFormat.e4m3)


def recent(frames: int) -> KVConf:
    return KVConf(MX, quantize_k=True, bits=4, recent_frames=frames)


def cache_of(conf: KVConf, windows: list[int]) -> KVCache:
    return KVCache(len(windows), 1, HEADS, DIM, TOKENS, windows, conf, torch.float32, "cpu")


def by_frame(x: Tensor, frames: int) -> Tensor:
    return x.unflatten(2, (frames, TOKENS))


@pytest.mark.parametrize("count", [1, 2, 3, 9])
@pytest.mark.parametrize("keep", [1, 2, 5])
@pytest.mark.parametrize("first", [0, 3])
def test_the_newest_are_read_in_8_bits_and_older_ones_in_4(keep: int, count: int, first: int) -> None:
    generator = torch.Generator().manual_seed(keep)
    caches = [cache_of(conf, [keep]) for conf in (recent(count), FOUR, EIGHT)]
    for _ in range(2):  # a second prefill begins anew
        history = [torch.randn(1, HEADS, (keep + 1) * TOKENS, DIM, generator=generator) for _ in "kv"]
        for cache in caches:
            cache.load(0, *history, first=first)
        for _ in range(2 * keep + 1):
            own = [torch.randn(1, HEADS, TOKENS, DIM, generator=generator) for _ in "kv"]
            for cache in caches:
                cache.advance()
            slot = int(caches[0].slot(0))
            fresh = {(slot - age) % keep for age in range(1, min(count, keep - 1) + 1)}
            for found, four, eight in zip(*(cache.window(0, *own) for cache in caches), strict=True):
                for place in range(keep):
                    expected = eight if place in fresh else four
                    ours, theirs = (by_frame(x, keep)[:, :, place] for x in (found, expected))
                    assert torch.equal(ours, theirs), (place, slot)
            for cache in caches:
                cache.store(0, *own)
            for found, four, eight in zip(*(cache.ordered(0) for cache in caches), strict=True):
                new = min(count, keep - 1)
                expected = torch.cat((four[:, :, : (keep - new) * TOKENS], eight[:, :, (keep - new) * TOKENS :]), 2)
                assert torch.equal(found, expected)


def test_a_saved_cache_goes_on_as_it_would_have() -> None:
    generator = torch.Generator().manual_seed(0)
    cache = cache_of(recent(2), [4])
    frames = [[torch.randn(1, HEADS, TOKENS, DIM, generator=generator) for _ in "kv"] for _ in range(4)]
    cache.load(0, *(torch.randn(1, HEADS, 4 * TOKENS, DIM, generator=generator) for _ in "kv"))
    saved = cache.saved()
    outcomes = []
    for _ in range(2):
        for own in frames:
            cache.advance()
            windows = [x.clone() for x in cache.window(0, *own)]
            cache.store(0, *own)
        outcomes.append(windows)
        cache.restore(saved)
    assert all(torch.equal(one, two) for one, two in zip(*outcomes, strict=True))


def test_bytes_are_counted_by_formula_and_in_fact() -> None:
    sizes = cache_of(recent(2), [5, 3, 1]).nbytes()
    assert sizes.computed == sizes.allocated
    assert set(sizes.by_format) == {"e2m1+e4m3", "e2m1"}
    assert sizes.allocated < cache_of(EIGHT, [5, 3, 1]).nbytes().allocated


def test_a_label_says_so_and_nonsense_is_refused() -> None:
    assert describe(recent(2), 4) == "K e2m1, V e2m1, newest 2 frames e4m3"
    with pytest.raises(ValueError, match="recent_frames=2: concerns 4-bit MX alone"):
        validate(KVConf(MX, recent_frames=2), DIM)
    with pytest.raises(ValueError, match="recent_frames=-1: must be at least 0"):
        validate(recent(-1), DIM)
    with pytest.raises(ValueError, match=r"attention=fused does not know the storage e2m1\+e4m3"):
        check_storage(AttentionKind.fused, recent(1), DIM)


def test_every_way_back_and_every_layer_is_a_config_of_its_own() -> None:
    for step in fallbacks(MXConf(), recent(2), 4):
        validate(step.kv, DIM)
    late = KVConf(MX, quantize_k=True, bits=4, v_format=KVFormat.e4m3, k_late_layers=1, recent_frames=2, hadamard=True)
    for layer in range(2):
        validate(layer_cache_conf(late, layer, 2), DIM)
    assert not layer_cache_conf(KVConf(MX, bits=4, late_layers=1, recent_frames=2, hadamard=True), 0, 2).hadamard
