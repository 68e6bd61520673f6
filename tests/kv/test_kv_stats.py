import json
import math

import pytest
import torch
from kv_cases import DH, I8, MX, MX_KV, STORAGES, WINDOWS, B, H, P, W, make_cache, prefill, roll

from harness.kv import KVConf, KVScales, KVStats, KVStorage


def sampled(conf, windows, frames):
    """Statistics of K = V = each of ``frames``, tensors ``[B, H, P, Dh]``, after a prefill of ones."""
    cache = make_cache(conf, windows=windows)
    stats = KVStats(cache)
    ones = torch.ones(B, H, W * P, DH)
    for layer in range(len(windows)):
        cache.load(layer, ones, ones)
    for x in frames:
        cache.advance()
        for layer in range(len(windows)):
            cache.window(layer, x, x)
            cache.store(layer, x, x)
        stats.sample()
    return stats.report()


def only(report, layer, tensor):
    (entry,) = [e for e in report["layers"] if (e["layer"], e["tensor"]) == (layer, tensor)]
    return entry


def test_saturation_and_scales_over_time():
    """One element of each block is the format's maximum, under the scale 2^2, then 2^3."""
    quiet = torch.ones(B, H, P, DH)
    quiet[..., 0] = 6 * 4
    report = sampled(STORAGES["mx4_kv"], [2, 2], [quiet, quiet * 2, torch.zeros(B, H, P, DH)])
    assert report["frames"] == [W, W + 1, W + 2]
    for layer in range(2):
        for name in "kv":
            entry = only(report, layer, name)
            assert entry["format"] == "e2m1"
            assert (entry["elements"], entry["saturated"]) == (3 * B * H * P * DH, 2 * B * H * P)
            assert entry["over_time"]["saturated_share"] == [1 / 32, 1 / 32, 0]
            assert entry["over_time"]["log2_scale_mean"] == [2, 3, None]
            assert (entry["log2_scale_min"], entry["log2_scale_mean"], entry["log2_scale_max"]) == (2, 2.5, 3)
    assert report["nonfinite"] == []


def test_int8_scales_are_powers_too():
    x = torch.full((B, H, P, DH), 127.0 / 8)
    entry = only(sampled(KVConf(storage=I8), [W], [x]), 0, "v")
    assert (entry["format"], entry["saturated_share"], entry["log2_scale_mean"]) == ("int8", 1, -3)


def test_moving_average_that_lags_shows_as_saturation():
    conf = KVConf(storage=MX, scales=KVScales.per_head_ema)
    conf.ema.warmup_frames = 0
    loud = torch.full((B, H, P, DH), 100.0)
    entry = only(sampled(conf, [W], [loud / 100, *[loud] * 40]), 0, "v")
    shares = entry["over_time"]["saturated_share"]
    assert (shares[1], shares[-1]) == (1, 0)
    assert entry["over_time"]["log2_scale_max"][-1] == -2, "2^-2 is the smallest scale that holds 100 in E4M3"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", STORAGES)
def test_non_finite_values_name_layer_and_frame(gen, name, bad):
    cache = make_cache(STORAGES[name])
    stats = KVStats(cache)
    prefill((cache,), WINDOWS, W, gen)
    roll(cache, 1, gen)
    stats.sample()
    cache.advance()
    for layer in range(len(WINDOWS)):
        k, v = torch.ones(2, B, H, P, DH)
        if layer == 2:
            v[1, 0, 3, 7] = bad
        cache.window(layer, k, v)
        cache.store(layer, k, v)
    stats.sample()
    assert stats.report()["nonfinite"] == [{"frame": W + 1, "layer": 2, "tensor": "v", "count": 1}]


def test_rollouts_are_summed_frame_by_frame(gen):
    cache = make_cache(MX_KV)
    stats = KVStats(cache)
    for _rollout in range(3):
        prefill((cache,), WINDOWS, W, gen)
        for _frame in range(2):
            roll(cache, 1, gen)
            stats.sample()
    report = stats.report()
    assert report["frames"] == [W, W + 1]
    assert {entry["elements"] for entry in report["layers"]} == {3 * 2 * B * H * P * DH}
    assert [(e["layer"], e["tensor"]) for e in report["layers"]] == [(i, n) for i in range(4) for n in "kv"]


def test_sampling_changes_nothing_and_is_plain_data(gen):
    watched, unwatched = make_cache(STORAGES["ema"]), make_cache(STORAGES["ema"])
    stats = KVStats(watched)
    prefill((watched, unwatched), WINDOWS, W, gen)
    for cache in (watched, unwatched):
        again = torch.Generator().manual_seed(1)
        for _ in range(W):
            roll(cache, 1, again)
            if cache is watched:
                stats.sample()
    for layer in range(len(WINDOWS)):
        assert all(map(torch.equal, watched.ordered(layer), unwatched.ordered(layer)))
    report = stats.report()
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_only_quantised_rings_are_listed_and_nothing_sampled_is_nothing_said():
    assert KVStats(make_cache(MX_KV)).report() == {"frames": [], "layers": [], "nonfinite": []}
    report = sampled(KVConf(storage=KVStorage.mx, late_layers=1), [2, 2], [torch.ones(B, H, P, DH)])
    assert [(e["layer"], e["tensor"]) for e in report["layers"]] == [(1, "v")]
