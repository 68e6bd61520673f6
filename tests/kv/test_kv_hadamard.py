"""The Hadamard basis of the cache: exact, and large values cost their block less."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from harness.kv import KVCache, KVConf, KVStorage, describe, validate
from harness.kv.conf import KVFormat
from harness.kv.hadamard import hadamard_matrix
from harness.rollout import AttentionKind
from harness.rollout.attention import RingAttention

HEADS, FRAMES, TOKENS, DIM = 2, 4, 8, 64
FOUR_BIT = KVConf(KVStorage.mx, quantize_k=True, bits=4)
TURNED = KVConf(KVStorage.mx, quantize_k=True, bits=4, hadamard=True)


def cache_of(conf: KVConf, layers: int = 1) -> KVCache:
    return KVCache(layers, 1, HEADS, DIM, TOKENS, [FRAMES] * layers, conf, torch.float32, "cpu")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attended(conf: KVConf, outliers: float) -> tuple[Tensor, Tensor]:
    """Attention of two frames over a cache of ``conf``, and over one that is not quantised."""
    factors = torch.ones(DIM)
    factors[5] = outliers

    def kqv(frames: int, seed: int) -> list[Tensor]:
        return [normal(1, HEADS, frames * TOKENS, DIM, seed=seed + i) * (factors if i != 1 else 1) for i in range(3)]

    results = []
    for own in (conf, KVConf()):
        cache = cache_of(own)
        history = kqv(FRAMES, 0)
        cache.load(0, cache.turned("k", 0, history[0]), cache.turned("v", 0, history[2]))
        outputs = []
        for frame in range(2):
            cache.advance()
            k, q, v = kqv(1, 10 * frame + 10)
            outputs.append(RingAttention(cache, AttentionKind.sdpa, store=True)(0, q, k, v))
        results.append(torch.cat(outputs, 2))
    return results[0], results[1]


@pytest.mark.parametrize("size", [1, 2, 32, 64, 128])
def test_the_matrix_is_orthonormal_and_its_own_inverse(size: int) -> None:
    matrix = hadamard_matrix(size, "cpu")
    torch.testing.assert_close(matrix @ matrix, torch.eye(size), rtol=0, atol=1e-6)
    assert matrix.abs().min() == matrix.abs().max()


def test_attention_over_a_turned_cache_is_attention() -> None:
    conf = KVConf(KVStorage.i8_scale, quantize_k=True, hadamard=True)
    found, expected = attended(conf, outliers=1)
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_large_values_of_one_channel_cost_less() -> None:
    pairs = [attended(conf, outliers=10) for conf in (TURNED, FOUR_BIT)]
    turned, plain = (float((found - expected).norm()) for found, expected in pairs)
    assert turned < 0.75 * plain


def test_only_what_is_quantised_is_turned() -> None:
    conf = KVConf(KVStorage.mx, quantize_k=False, hadamard=True, late_layers=1)
    cache = cache_of(conf, layers=2)
    assert [[cache.turns(name, layer) for name in "kv"] for layer in range(2)] == [[False, False], [False, True]]
    x = normal(1, HEADS, TOKENS, DIM)
    assert cache.turned("k", 1, x) is x
    assert cache.turned("v", 0, x) is x
    assert not torch.allclose(cache.turned("v", 1, x), x)
    torch.testing.assert_close(cache.turned("v", 1, cache.turned("v", 1, x)), x)
    assert cache.of_layer(1).turns("v", 0)


def test_a_label_says_so_and_nonsense_is_refused() -> None:
    assert describe(TURNED, 4) == "K e2m1, V e2m1, Hadamard-turned"
    validate(TURNED, head_dim=64)
    with pytest.raises(ValueError, match="head size 96 is not a power of two"):
        validate(TURNED, head_dim=96)
    with pytest.raises(ValueError, match="hadamard=true: turns what is quantised, and nothing is"):
        validate(KVConf(hadamard=True), head_dim=64)
    with pytest.raises(ValueError, match="k_format=e4m3"):
        validate(KVConf(k_format=KVFormat.e4m3, hadamard=True), head_dim=64)
