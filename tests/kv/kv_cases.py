"""What the tests of the cache share: sizes, storages, and the obvious cache to hold the ring against."""

import torch

from harness.kv import EMAConf, KVCache, KVConf, KVFormat, KVScales, KVStorage

B, H, P, DH, W = 2, 3, 4, 32, 5
WINDOWS = [5, 2, 3, 1]  # global and local layers side by side
I8, MX = KVStorage.i8_scale, KVStorage.mx

MX_KV = KVConf(storage=MX, quantize_k=True)
STORAGES = {
    "bf16": KVConf(),
    "i8": KVConf(storage=I8, quantize_k=True),
    "mx_v": KVConf(storage=MX),
    "mx_kv": MX_KV,
    "mx4_kv": KVConf(storage=MX, quantize_k=True, bits=4),
    "ema": KVConf(storage=MX, quantize_k=True, scales=KVScales.per_head_ema, ema=EMAConf(0.5, 2)),
    "ema4": KVConf(storage=MX, quantize_k=True, bits=4, scales=KVScales.per_head_ema, ema=EMAConf(0.5, 2)),
    "late": KVConf(storage=MX, quantize_k=True, late_layers=3, k_late_layers=1),
    "i8_k_mx4_v": KVConf(k_storage=I8, v_storage=MX, v_format=KVFormat.e2m1, v_late_layers=2),
}


class RollCat:
    """Keeps every frame in order; concatenates and cuts on every call."""

    def __init__(self, windows):
        self.windows, self.frames = windows, [([], []) for _ in windows]

    def load(self, layer, k, v):
        self.frames[layer] = (list(k.split(P, dim=2)), list(v.split(P, dim=2)))

    def window(self, layer, k, v):
        keep = self.windows[layer]
        return tuple(torch.cat([*old, own][-keep:], dim=2) for old, own in zip(self.frames[layer], (k, v), strict=True))

    def store(self, layer, k, v):
        for old, own in zip(self.frames[layer], (k, v), strict=True):
            old.append(own)

    def ordered(self, layer):
        return tuple(torch.cat(old[-self.windows[layer] :], dim=2) for old in self.frames[layer])


def make_cache(conf=None, windows=WINDOWS, dtype=torch.float32, head_dim=DH, batch=B, device="cpu"):
    return KVCache(len(windows), batch, H, head_dim, P, windows, conf or KVConf(), dtype, device)


def frames_of(n, gen, batch=B, dtype=torch.float32):
    return tuple(torch.randn(batch, H, n * P, DH, generator=gen).to(dtype) for _ in "kv")


def in_order(window, frame, keep):
    """A window in slot order, rearranged to oldest first."""
    slots = torch.tensor([f % keep for f in range(frame - keep + 1, frame + 1)])
    return window.unflatten(2, (keep, P))[:, :, slots].flatten(2, 3)


def prefill(caches, windows, frames, gen, batch=B, dtype=torch.float32):
    for layer in range(len(windows)):
        k, v = frames_of(frames, gen, batch, dtype)
        for cache in caches:
            cache.load(layer, k, v)


def roll(cache, frames, gen, batch=B, dtype=torch.float32):
    """Advance by ``frames``, storing random K and V; returns the last frame's of every layer."""
    own = []
    for _ in range(frames):
        cache.advance()
        own = [frames_of(1, gen, batch, dtype) for _ in cache.windows]
        for layer, (k, v) in enumerate(own):
            cache.window(layer, k, v)
            cache.store(layer, k, v)
    return own
