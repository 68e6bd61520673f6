"""Every storage against a reference that rounds each frame once, when it is stored, and then only moves it about."""

import math

import pytest
import torch
from kv_cases import DH, I8, MX, STORAGES, WINDOWS, B, H, P, RollCat, W, frames_of, in_order, make_cache, prefill, roll

from harness.formats.mx import decode, encode
from harness.kv import EMAConf, KVConf, KVScales, KVStorage

E2M1_VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def to_element(x, fmt):
    """Nearest value of the element format, saturating."""
    x = x.clamp(-fmt.max, fmt.max)
    if fmt.name in FLOAT8:
        return x.to(FLOAT8[fmt.name]).float()
    nearest = (x.abs().unsqueeze(-1) - E2M1_VALUES).abs().argmin(-1)
    return E2M1_VALUES[nearest].copysign(x)


class Rounder:
    """Rounds the frames of one ring; written anew from the documented rules, block by block where that is simplest."""

    def __init__(self, conf, name):
        self.conf, self.storage, self.fmt = conf, conf.storage_of(name), conf.element_format(name)

    def prefill(self, frames):
        self.amax, self.seen = torch.stack([f.abs().amax((2, 3)) for f in frames]).amax(0), 0
        return [self._rounded(f) for f in frames]

    def new(self, frame):
        own, ema = frame.abs().amax((2, 3)), self.conf.ema
        if self.seen < ema.warmup_frames:
            self.amax = torch.maximum(self.amax, own)
        else:
            self.amax = ema.momentum * self.amax + (1 - ema.momentum) * own
        self.seen += 1
        return self._rounded(frame)

    def _rounded(self, x):
        if self.storage is I8:
            scale = (x.abs().amax(-1, keepdim=True) / 127).bfloat16().float()
            return (x / scale).round().clamp(-127, 127) * scale
        if self.conf.scales is KVScales.per_token:
            return decode(encode(x, self.fmt), self.fmt, torch.float32)
        exponent = (self.amax.clamp(min=self.conf.ema.floor) / self.fmt.max).log2().ceil()
        scale = (2.0**exponent)[:, :, None, None]
        return to_element(x / scale, self.fmt) * scale


class RoundedRollCat(RollCat):
    """:class:`RollCat` that keeps rounded frames; ``window`` gives the current one as it is."""

    def __init__(self, windows, conf):
        super().__init__(windows)
        self.conf = conf

    def load(self, layer, k, v):
        keep, layers = self.windows[layer], len(self.windows)
        self.rounders = getattr(self, "rounders", {})
        frames = []
        for name, x in (("k", k), ("v", v)):
            quantised = self.conf.quantises(name, layer, layers)
            rounder = self.rounders[layer, name] = Rounder(self.conf, name) if quantised else None
            newest = list(x.split(P, dim=2))[-keep:]
            frames.append(rounder.prefill(newest) if rounder else newest)
        self.frames[layer] = tuple(frames)

    def store(self, layer, k, v):
        rounded = [rounder.new(x) if (rounder := self.rounders[layer, name]) else x for name, x in (("k", k), ("v", v))]
        super().store(layer, *rounded)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("conf", STORAGES.values(), ids=STORAGES)
def test_window_and_store_over_many_rollouts_longer_than_the_window(gen, conf, batch):
    cache, reference = make_cache(conf, batch=batch), RoundedRollCat(WINDOWS, conf)
    for prefilled in (W, W + 3):
        prefill((cache, reference), WINDOWS, prefilled, gen, batch)
        for frame in range(prefilled, prefilled + 3 * W + 1):
            cache.advance()
            for layer, keep in enumerate(WINDOWS):
                loudness = 10.0 ** (frame % 5 - 2)  # scales differ from frame to frame
                own = [x * loudness for x in frames_of(1, gen, batch)]
                for got, want, mine in zip(cache.window(layer, *own), reference.window(layer, *own), own, strict=True):
                    got = in_order(got, frame, keep)
                    assert torch.equal(got, want)
                    assert torch.equal(got[:, :, -P:], mine), "the frame's own K and V are not quantised"
                for c in (cache, reference):
                    c.store(layer, *own)
                for got, want in zip(cache.ordered(layer), reference.ordered(layer), strict=True):
                    assert torch.equal(got, want)


@pytest.mark.parametrize("conf", STORAGES.values(), ids=STORAGES)
def test_clips_of_a_batch_do_not_touch_each_other(gen, conf):
    together, alone = make_cache(conf), make_cache(conf, batch=1)
    k, v = frames_of(W, gen)
    for layer in range(len(WINDOWS)):
        together.load(layer, k, v)
        alone.load(layer, k[1:], v[1:])
    for _ in range(W + 1):
        k, v = frames_of(1, gen)
        k[0] *= 100  # the other clip gets loud
        for cache, own in ((together, (k, v)), (alone, (k[1:], v[1:]))):
            cache.advance()
            for layer in range(len(WINDOWS)):
                cache.window(layer, *own)
                cache.store(layer, *own)
    for layer in range(len(WINDOWS)):
        for both, single in zip(together.ordered(layer), alone.ordered(layer), strict=True):
            assert torch.equal(both[1:], single)


@pytest.mark.parametrize("name", ["i8", "mx4_kv", "ema"])
def test_compiled_code_reads_and_writes_the_same(gen, name):
    """The path that compilers take (no scratch, no lookup tables) gives the same bits; traced, not compiled."""
    torch._dynamo.reset()
    eager, traced = (make_cache(STORAGES[name], windows=[3], dtype=torch.bfloat16) for _ in range(2))
    prefill((eager, traced), [3], 3, gen, dtype=torch.bfloat16)

    def frame(k, v):
        traced.advance()
        window = traced.window(0, k, v)
        traced.store(0, k, v)
        return window

    compiled = torch.compile(frame, backend="eager", fullgraph=True)
    for _ in range(4):
        own = frames_of(1, gen, dtype=torch.bfloat16)
        eager.advance()
        assert all(map(torch.equal, compiled(*own), eager.window(0, *own)))
        eager.store(0, *own)
        assert all(map(torch.equal, traced.ordered(0), eager.ordered(0)))
    assert traced.nbytes().scratch == 0


@pytest.mark.parametrize(
    ("name", "bound"), [("i8", 1 / 254), ("mx_v", 1 / 16), ("mx4_kv", 1 / 4), ("ema", 1 / 8), ("ema4", 1 / 4)]
)
def test_v_is_stored_within_the_formats_precision(gen, name, bound):
    """Largest error over a block's amax: half a step of the format at its top, scales being up to twice too large."""
    cache = make_cache(STORAGES[name], windows=[W])
    k, v = frames_of(W, gen)
    cache.load(0, k, v)
    assert float((cache.ordered(0)[1] - v).abs().max() / v.abs().max()) <= 1.01 * bound


def ema_cache(conf=None, **fields):
    conf = conf or KVConf(storage=MX, scales=KVScales.per_head_ema, ema=EMAConf(**fields))
    return make_cache(conf, windows=[W])


def stored_scales(cache):
    return cache.rings[0]["v"].stored.scales.flatten(2)


def load(cache, amax):
    cache.load(0, torch.zeros(B, H, W * P, DH), torch.full((B, H, W * P, DH), amax))


def push(cache, amax):
    cache.advance()
    x = torch.full((B, H, P, DH), float(amax))
    cache.window(0, x, x)
    cache.store(0, x, x)
    slot = int(cache.slot(0))
    return (
        float(stored_scales(cache)[0, 0, slot]) - 127 + 8
    )  # log2 of the power of two above amax, as E4M3's max is 448


def test_moving_average_grows_in_warm_up_and_follows_after():
    cache = ema_cache(momentum=0.5, warmup_frames=2)
    load(cache, 1.0)
    assert push(cache, 1.0) == 0
    assert push(cache, 6.0) == 2, "1, then 6: within the warm-up the largest counts"
    averages = [6.0]
    for _ in range(4):
        averages.append((averages[-1] + 1) / 2)
        assert push(cache, 1.0) == math.ceil(math.log2(averages[-1] / 448)) + 8
    assert push(cache, 1.0) < 2


def test_a_frame_above_the_moving_average_saturates_and_the_frames_before_keep_their_scales():
    cache = ema_cache(momentum=0.9, warmup_frames=0)
    load(cache, 1.0)
    before = stored_scales(cache).clone()
    push(cache, 100.0)
    assert torch.equal(stored_scales(cache)[:, :, 1:], before[:, :, 1:])
    newest = cache.ordered(0)[1][:, :, -P:]
    assert newest.unique().tolist() == [448 * 2.0**-5], "average 10.9, so scale 2^-5: 100 is cut to 14"


def test_a_silent_head_has_a_scale_when_it_speaks():
    cache = ema_cache(momentum=0.9, warmup_frames=0, floor=0.5)
    load(cache, 0.0)
    push(cache, 0.25)
    assert cache.ordered(0)[1][:, :, -P:].unique().tolist() == [0.25]


def test_prefill_calibrates_on_the_frames_it_keeps():
    cache = ema_cache()
    x = torch.ones(B, H, (W + 1) * P, DH)
    x[:, :, :P] = 1000  # older than the window
    x[:, :, -P:] = 3
    cache.load(0, x, x)
    assert torch.equal(cache.ordered(0)[1], x[:, :, P:])
    assert cache.rings[0]["v"].codec.amax.unique().tolist() == [3]


def test_reset_forgets_the_moving_average(gen):
    cache, fresh = ema_cache(), ema_cache()
    load(cache, 1000.0)
    cache.reset()
    for c in (cache, fresh):
        assert push(c, 1.0) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["i8", "ema", "ema4"])
def test_non_finite_values_read_as_nan_and_leave_others_alone(gen, name, bad):
    cache = make_cache(STORAGES[name], windows=[W])
    k, v = frames_of(W, gen)
    cache.load(0, k, v)
    own_k, own_v = frames_of(1, gen)
    own_v[1, 2, 3, 4] = bad
    cache.advance()
    cache.window(0, own_k, own_v)
    cache.store(0, own_k, own_v)
    nans = cache.ordered(0)[1].isnan()
    assert nans[1, 2, -1].all()
    assert nans.any(-1).sum() == (P if name.startswith("ema") else 1)
    roll(cache, W, gen)  # it leaves with its frame
    assert cache.ordered(0)[1].isfinite().all()


@pytest.mark.parametrize("storage", [I8, MX])
def test_zeros_read_as_zeros(storage):
    cache = make_cache(KVConf(storage=storage, quantize_k=True), windows=[W])
    zeros = torch.zeros(B, H, W * P, DH)
    cache.load(0, zeros, zeros)
    assert all(torch.equal(x, zeros) for x in cache.ordered(0))


def test_i8_scale_takes_head_sizes_that_mx_cannot():
    cache = make_cache(KVConf(storage=KVStorage.i8_scale, quantize_k=True), windows=[W], head_dim=40)
    x = torch.linspace(-1, 1, B * H * W * P * 40).view(B, H, W * P, 40)
    cache.load(0, x, x)
    assert torch.allclose(cache.ordered(0)[0], x, atol=1 / 127)
