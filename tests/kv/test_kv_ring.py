"""The ring against the obvious cache: a list of frames that is concatenated, and cut to the window."""

import pytest
import torch
from kv_cases import DH, MX_KV, STORAGES, WINDOWS, B, H, P, RollCat, W, frames_of, in_order, make_cache, prefill, roll

from harness.formats.mx import decode, encode
from harness.formats.scales import ScaleMode
from harness.kv import KVCache, KVConf, KVStorage


@pytest.mark.parametrize("prefilled", [W, W + 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_plain_ring_is_bit_exact_with_roll_and_cat(gen, prefilled, batch):
    cache, naive = make_cache(batch=batch), RollCat(WINDOWS)
    prefill((cache, naive), WINDOWS, prefilled, gen, batch)
    for frame in range(prefilled, prefilled + 3 * W + 2):
        cache.advance()
        assert cache.frame.item() == frame
        for layer, keep in enumerate(WINDOWS):
            for _step in range(2):  # a later step replaces the frame's own K and V
                k, v = frames_of(1, gen, batch)
                for got, want in zip(cache.window(layer, k, v), naive.window(layer, k, v), strict=True):
                    assert torch.equal(in_order(got, frame, keep), want)
            for c in (cache, naive):
                c.store(layer, k, v)
        for layer in range(len(WINDOWS)):
            for got, want in zip(cache.ordered(layer), naive.ordered(layer), strict=True):
                assert torch.equal(got, want)


@pytest.mark.parametrize("name", STORAGES)
def test_attention_gets_contiguous_keys_and_values(gen, name):
    cache = make_cache(STORAGES[name], dtype=torch.bfloat16)
    prefill((cache,), WINDOWS, W, gen, dtype=torch.bfloat16)
    cache.advance()
    for layer, keep in enumerate(WINDOWS):
        for x in cache.window(layer, *frames_of(1, gen, dtype=torch.bfloat16)):
            assert (tuple(x.shape), x.dtype, x.is_contiguous()) == ((B, H, keep * P, DH), torch.bfloat16, True)


def test_plain_window_is_the_ring_itself(gen):
    cache = make_cache()
    prefill((cache,), WINDOWS, W, gen)
    cache.advance()
    k, v = cache.window(0, *frames_of(1, gen))
    assert k.data_ptr() == cache.rings[0]["k"].buffers()[0].data_ptr()
    assert v.data_ptr() == cache.rings[0]["v"].buffers()[0].data_ptr()
    assert cache.store_is_free
    assert cache.nbytes().scratch == 0


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("scale_mode", list(ScaleMode))
def test_mx_ring_holds_each_frame_as_encoded_once(gen, bits, scale_mode):
    """Rows and scales stay together: after many wraps every frame equals its own encoding, decoded."""
    conf = KVConf(storage=KVStorage.mx, quantize_k=True, bits=bits, scale_mode=scale_mode)
    cache, naive = make_cache(conf), RollCat(WINDOWS)
    prefill((cache, naive), WINDOWS, W, gen)

    def rounded(x, name):
        fmt = conf.element_format(name)
        return decode(encode(x, fmt, scale_mode), fmt, torch.float32)

    for frame in range(W, W + 2 * W + 1):
        cache.advance()
        for layer, keep in enumerate(WINDOWS):
            own = [x * 10.0 ** (frame % 5 - 2) for x in frames_of(1, gen)]  # scales differ from frame to frame
            window, reference = cache.window(layer, *own), naive.window(layer, *own)
            for name, got, want, mine in zip("kv", window, reference, own, strict=True):
                got = in_order(got, frame, keep)
                assert torch.equal(got[:, :, -P:], mine), "the frame's own K and V are not quantised"
                assert torch.equal(got[:, :, :-P], rounded(want[:, :, :-P], name))
            for c in (cache, naive):
                c.store(layer, *own)
            for name, got, want in zip("kv", cache.ordered(layer), naive.ordered(layer), strict=True):
                assert torch.equal(got, rounded(want, name))


def test_v_only_leaves_k_exact_and_uncopied(gen):
    cache = make_cache(KVConf(storage=KVStorage.mx))
    prefill((cache,), WINDOWS, W, gen)
    cache.advance()
    k, v = frames_of(1, gen)
    keys, values = cache.window(0, k, v)
    assert keys.data_ptr() == cache.rings[0]["k"].buffers()[0].data_ptr()
    assert values.data_ptr() == cache.scratch.of("v", cache.rings[0]["v"].shape).data_ptr()
    assert cache.nbytes().by_format.keys() == {"float32", "e4m3"}


def test_all_layers_share_one_scratch(gen):
    cache = make_cache(MX_KV)
    prefill((cache,), WINDOWS, W, gen)
    cache.advance()
    starts = {cache.window(layer, *frames_of(1, gen))[0].data_ptr() for layer in range(len(WINDOWS))}
    assert len(starts) == 1
    assert cache.nbytes().scratch == 2 * B * H * W * P * DH * 4


@pytest.mark.parametrize("conf", STORAGES.values(), ids=STORAGES)
def test_buffers_never_move(gen, conf):
    cache = make_cache(conf)

    def addresses():
        return [buffer.data_ptr() for buffer in cache.buffers()]

    before = addresses()
    for _rollout in range(2):
        prefill((cache,), WINDOWS, W, gen)
        roll(cache, W + 2, gen)
    cache.reset()
    assert addresses() == before


@pytest.mark.parametrize("conf", STORAGES.values(), ids=STORAGES)
def test_second_prefill_leaves_nothing_of_the_first(gen, conf):
    used, fresh = make_cache(conf), make_cache(conf)
    prefill((used,), WINDOWS, W + 1, gen)
    roll(used, 3, gen)
    prefill((used, fresh), WINDOWS, W, gen)
    for cache in (used, fresh):
        cache.advance()
    own = frames_of(1, gen)
    for layer in range(len(WINDOWS)):
        for a, b in zip(used.window(layer, *own), fresh.window(layer, *own), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("conf", "bits_k", "bits_v"),
    [
        (KVConf(), 16, 16),
        (KVConf(storage=KVStorage.mx), 16, 8.25),
        (MX_KV, 8.25, 8.25),
        (STORAGES["mx4_kv"], 4.25, 4.25),
        (STORAGES["i8"], 8.5, 8.5),
    ],
    ids=["bf16", "v8", "kv8", "kv4", "i8"],
)
def test_allocated_bytes_are_the_computed_ones(conf, bits_k, bits_v):
    cache = make_cache(conf, dtype=torch.bfloat16)
    size = cache.nbytes()
    elements = B * H * P * DH * sum(WINDOWS)
    assert size.allocated == size.computed == elements * (bits_k + bits_v) / 8
    assert size.plain == elements * 4
    assert sum(size.by_format.values()) == size.allocated


def test_late_layers_quantise_the_last_ones_only():
    conf = KVConf(storage=KVStorage.mx, quantize_k=True, late_layers=3, k_late_layers=1)
    formats = [[ring.format_name for ring in rings.values()] for rings in make_cache(conf).rings]
    assert formats == [["float32", "float32"], ["float32", "e4m3"], ["float32", "e4m3"], ["e5m2", "e4m3"]]


def test_prefill_shorter_than_the_window_is_refused(gen):
    with pytest.raises(ValueError, match="prefill of 4 frames: layer 0 keeps a window of 5"):
        make_cache().load(0, *frames_of(4, gen))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"windows": [5, 0]}, r"windows\[1\]=0"), ({"windows": [5]}, "1 windows for 2 layers"), ({"batch": 0}, "batch=0")],
)
def test_sizes_are_checked(change, message):
    sizes = {"layers": 2, "batch": 1, "heads": 1, "head_dim": 32, "tokens": 4, "windows": [5, 2]} | change
    with pytest.raises(ValueError, match=message):
        KVCache(**sizes, conf=KVConf(), dtype=torch.float32, device="cpu")


def test_one_layers_cache_shares_the_whole_ones_buffers(gen):
    """What stands at another place in the whole cache is layer 0 of the view; frames are begun by the whole one."""
    cache, other = make_cache(MX_KV), make_cache(MX_KV)
    views = [cache.of_layer(layer) for layer in range(len(WINDOWS))]
    prefill((cache, other), WINDOWS, W, gen)
    for _ in range(W + 1):
        for whole in (cache, other):
            whole.advance()
        own = frames_of(1, gen)
        for layer, view in enumerate(views):
            for got, want in zip(view.window(0, *own), other.window(layer, *own), strict=True):
                assert torch.equal(got, want)
            view.store(0, *own)
            other.store(layer, *own)
    for ours, theirs in zip(cache.buffers(), other.buffers(), strict=True):
        assert torch.equal(ours, theirs)
