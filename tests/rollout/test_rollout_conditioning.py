"""A frame's beginning by kernels of ours: their own source compiled for a CPU, against float64, the cache and the
model; who uses them; on a GPU against the model's own operators."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conditioning_cpu import RUNS, CPULaunches, launches_in
from rollout_cases import SAMPLER, make_core, make_inputs, make_rollout, play
from torch import nn

from harness.kernels import launch, rehearsal
from harness.kernels.cuda import conditioning as kernels
from harness.kernels.cuda import linear as cuda_linear
from harness.kernels.cuda import packing
from harness.kernels.cuda.conditioning import ConditioningShape, FrameClock
from harness.kernels.cuda.linear import PackedBF16Linear
from harness.kv import KVCache, KVConf
from harness.models.embeddings import ControlEmbedding, frequencies
from harness.models.rope import MotionRotary, OrthoRotary
from harness.mx.conf import MXConf
from harness.mx.transform import apply_mx
from harness.rollout import AttentionKind, CompileConf, SamplerConf, conditioning, make_cache, sampler, steps
from harness.rollout.conditioning import FrameConditioning, conditioning_unfit, control_weights, model_unfit
from harness.rollout.linears import pack
from harness.rollout.modulation import PlainProduct, StackedModulation

ON_GPU = torch.cuda.is_available()
REASON = cuda_linear.unavailable(torch.device("cuda", 0)) if ON_GPU else "needs a CUDA GPU"
hopper = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
emulated = pytest.mark.skipif(not RUNS, reason="needs the compiler g++, and ucontext as Linux has it")
SHAPE = ConditioningShape(width=384, steps=2, buttons=11, tokens=16, pairs=16)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return CPULaunches(tmp_path_factory.mktemp("conditioning"))


@pytest.fixture
def launches(compiled, monkeypatch):
    """The kernels on a CPU; what has been launched."""
    torch.manual_seed(0)
    compiled.seed, compiled.launched, compiled.some = 0, [], {}
    return launches_in(monkeypatch, compiled)


def weights_of(shape):
    """Weights as large as trained ones: outputs of order 1."""
    embed = ControlEmbedding(shape.buttons, shape.width).bfloat16().requires_grad_(False)
    for linear in (module for module in embed.modules() if isinstance(module, nn.Linear)):
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        if linear.bias is not None:
            nn.init.normal_(linear.bias)
    return embed, control_weights(embed)


def clock_of(shape, windows=(4,), rotary=None):
    """A cache's clock: (cache, clock, rotary)."""
    side = int(shape.tokens**0.5)
    rotary = rotary or MotionRotary(2 * shape.pairs, side, 2.0)
    sizes = len(windows), 1, 1, 2 * shape.pairs, shape.tokens
    cache = KVCache(*sizes, list(windows), KVConf(), torch.bfloat16, "cpu")
    base, uses_time, freqs, times, step = rotary.tables()
    return cache, FrameClock(cache.frame, cache.slots, times, base, uses_time, freqs, step), rotary


def begun(shape, weights, mouse, btn):
    clock = clock_of(shape)[1]
    freqs = frequencies(128, torch.device("cpu"))
    return kernels.begin_frame(shape, weights, freqs, (torch.tensor(mouse), torch.tensor(btn)), clock)[0]


def silu(x):
    return F.silu(x.double())


def bf16(x):
    return x.bfloat16().double()


def as_rounded(got, want, terms):
    """``got`` is ``want`` in BF16, but for sums ``terms`` of float32 on the verge of rounding the other way."""
    got = got.double()
    assert ((got - want).abs() <= 2**-7 * (want.abs() + terms.abs())).all()
    assert (got - want).norm() < 3e-3 * want.norm()


BUTTONS = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0]
MICE = [(0.0, 0.0), (3.0, -4.0), (-1e-30, 0.0), (-2500.0, 170.0), (1e30, -1e30), (-0.0, 7.5), (-3e38, 2.0)]


def features(mouse, angle_proj):
    """The mouse's features in float64, and by how much float32 may miss them."""
    mouse = torch.tensor(mouse).double()
    mouse = mouse.sign() * mouse.abs().log1p()
    angle = torch.atan2(mouse[1], mouse[0])
    direction = F.linear(bf16(torch.stack((angle.cos(), angle.sin()))), angle_proj.double())
    turns = 1000 * mouse.norm() * frequencies(128, torch.device("cpu")).double()
    magnitude = torch.cat((turns.sin(), turns.cos()))
    slack = torch.cat((2**-8 * angle_proj.double().abs().sum(1), 2**-22 * turns.repeat(2).abs()))
    return torch.cat((direction, magnitude)), slack + 2**-20


@emulated
@pytest.mark.parametrize("mouse", MICE)
def test_every_feature_of_the_mouse(launches, mouse):
    """A weight of ones on its diagonal lets features through, to SiLU."""
    embed, weights = weights_of(SHAPE)
    weights.mouse_in.zero_()
    weights.mouse_in[:512].fill_diagonal_(1)
    weights.mouse_in_bias.zero_()
    want, slack = features(mouse, embed.mouse.angle_proj.weight)
    got = begun(SHAPE, weights, mouse, BUTTONS)[0].double()
    assert (got[512:] == 0).all()
    error = (got[:512] - silu(want)).abs()
    assert (error <= 1.1 * slack + 2**-7 * want.abs()).all()
    assert (error <= 2**-7).float().mean() > 0.9 or max(map(abs, mouse)) > 1e4


@emulated
def test_a_mouse_that_is_no_number_reaches_no_button(launches):
    _, weights = weights_of(SHAPE)
    clean = begun(SHAPE, weights, (1.0, 2.0), BUTTONS)
    for mouse in ((torch.nan, 1.0), (1.0, torch.nan), (torch.inf, 1.0), (0.0, -torch.inf)):
        got = begun(SHAPE, weights, mouse, BUTTONS)
        assert got[0].isnan().all()
        assert torch.equal(got[1], clean[1])
    got = begun(SHAPE, weights, (1.0, 2.0), [torch.nan, *BUTTONS[1:]])
    assert torch.equal(got[0], clean[0])
    assert got[1].isnan().all()


@emulated
@pytest.mark.parametrize("buttons", [1, 11, 33])
def test_hidden_activations(launches, buttons):
    shape = ConditioningShape(64, 1, buttons, 4, 8)
    embed, weights = weights_of(shape)
    btn, mouse = (torch.rand(buttons) > 0.5).float(), (0.02, -0.01)  # small, so that float32's sines are exact
    got = begun(shape, weights, mouse, btn.tolist())
    given = bf16(features(mouse, weights.angle)[0]), 2 * btn.double() - 1
    for row, x, mlp in zip(got, given, (embed.mouse.mlp, embed.button.proj), strict=True):
        sums = F.linear(x, mlp.fc1.weight.double(), mlp.fc1.bias.double())
        as_rounded(row, bf16(silu(bf16(sums))), sums)


@emulated
@pytest.mark.parametrize(("width", "n_steps"), [(1536, 2), (384, 1), (384, 4), (80, 8)])
def test_conditioning_of_every_step(launches, width, n_steps):
    shape = ConditioningShape(width, n_steps, 11, 16, 16)
    embed, weights = weights_of(shape)
    hidden, embedded = torch.randn(2, 2048).bfloat16(), torch.randn(n_steps, width).bfloat16()
    got = kernels.add_controls(shape, weights, hidden, embedded, clock_of(shape)[1])
    mlps = embed.mouse.mlp, embed.button.proj
    linears = [mlp.fc2 for mlp in mlps]
    sums = [
        F.linear(x.double(), linear.weight.double(), linear.bias.double())
        for x, linear in zip(hidden, linears, strict=True)
    ]
    total = embedded.double() + bf16(sum(map(bf16, sums)))
    as_rounded(got, bf16(silu(bf16(total))), sum(x.abs() for x in (*sums, embedded.double())))


@emulated
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("width", "n_steps", "outputs"), [(1536, 2, 3072), (384, 4, 48), (80, 1, 16), (272, 8, 32)])
def test_a_plain_product(launches, width, n_steps, outputs, bias):
    shape = ConditioningShape(width, n_steps, 11, 16, 16)
    x = torch.randn(n_steps, width).bfloat16()
    weight, bias = torch.randn(outputs, width).bfloat16(), torch.randn(outputs).bfloat16() if bias else None
    got = kernels.plain_product(shape, x, weight, bias)
    want = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    terms = F.linear(x.double().abs(), weight.double().abs())
    assert ((got.double() - want).abs() <= 2**-8 * want.abs() + 2**-18 * terms).all()
    x[0, 3] = torch.nan
    again = kernels.plain_product(shape, x, weight, bias)
    assert again[0].isnan().all()
    assert torch.equal(again[1:], got[1:])


@emulated
def test_threads_may_run_in_any_order(launches):
    _, weights = weights_of(SHAPE)
    embedded, results = torch.randn(2, SHAPE.width).bfloat16(), []
    for seed in range(3):
        launches.seed = seed
        hidden = begun(SHAPE, weights, (3.0, -4.0), BUTTONS)
        results.append(kernels.add_controls(SHAPE, weights, hidden, embedded, clock_of(SHAPE)[1]))
    assert all(torch.equal(results[0], other) for other in results)


FRAMES = [0, 1, 59, 60, 1535, 1536, 100_000]
ROTARIES = {"motion": MotionRotary(32, 4, 2.0), "ortho": OrthoRotary(32, 4, 1536), "ortho, 60": OrthoRotary(32, 4, 60)}


CLOCK = {"begin_frame": (128, 129), "add_controls": (0, 1)}
"""The blocks that rotate, of up to 256 angles, and that count."""


def go_on(clock):
    """The kernels' clock goes on to the next frame, whose rotation this returns."""
    _, weights = weights_of(SHAPE)
    controls, freqs = (torch.zeros(2), torch.zeros(11)), frequencies(128, torch.device("cpu"))
    hidden, rotary = kernels.begin_frame(SHAPE, weights, freqs, controls, clock)
    kernels.add_controls(SHAPE, weights, hidden, torch.zeros(2, SHAPE.width).bfloat16(), clock)
    return rotary


@emulated
@pytest.mark.parametrize("name", ROTARIES)
def test_the_clock_is_the_caches_and_the_models(launches, name):
    launches.some = CLOCK
    windows = [60, 16, 60, 7, 2]
    cache, clock, rotary = clock_of(SHAPE, windows, ROTARIES[name])
    other = clock_of(SHAPE, windows)[0]
    for frame in FRAMES:
        for each in (cache, other):
            each.frame.fill_(frame - 1)
        found = go_on(clock)
        other.advance()
        assert int(cache.frame) == frame
        assert all(torch.equal(x, other.slots[size]) for size, x in cache.slots.items())
        for got, want in zip(found, rotary(cache.frame), strict=True):
            assert ((got - want).abs() <= 2**-22).all()


@emulated
def test_the_clock_goes_on_from_frame_to_frame(launches):
    launches.some = CLOCK
    cache, clock, _ = clock_of(SHAPE, [3, 5])
    for frame in range(7):
        go_on(clock)
        assert [int(x) for x in (cache.frame, cache.slot(0), cache.slot(1))] == [frame, frame % 3, frame % 5]


def built(core, n_steps=2, windows=SAMPLER):
    """(cache, embedded times, stacked modulation) of a rollout of one clip."""
    times = torch.linspace(1, 0.25, n_steps, device=core.device)[None]
    return make_cache(core, windows, KVConf(), 1), core.t_embed(times), StackedModulation(core)


def today(core, cache, modulate, embedded, mouse, btn):
    """A frame's beginning by the model's own operators: (modulation of each step, rotary)."""
    cache.advance()
    n_steps = embedded.shape[1]
    mouse, btn = (x[:, None].expand(-1, n_steps, -1) for x in (mouse, btn))
    modulation = modulate(core.add_controls(embedded, mouse, btn))
    return [modulation.frames(i, i + 1) for i in range(n_steps)], core.rotary(cache.frame)


def flat(modulations):
    vectors = (v for m in modulations for v in (*(x for block in m.blocks for x in block), m.out_scale, m.out_shift))
    return torch.cat([vector.double().flatten() for vector in vectors])


def exact_core(core):
    """``core`` in float64, which takes BF16 weights as they are."""
    exact = copy.deepcopy(core).double()
    exact.control_embed.mouse.forward = lambda mouse: mouse_in_double(exact.control_embed.mouse, mouse)
    exact.control_embed.button.forward = lambda btn: exact.control_embed.button.proj(2 * btn.double() - 1)
    return exact


def mouse_in_double(embed, mouse):
    mouse = mouse.double()
    mouse = mouse.sign() * mouse.abs().log1p()
    angle = torch.atan2(mouse[..., 1], mouse[..., 0])
    direction = embed.angle_proj(torch.stack((angle.cos(), angle.sin()), -1))
    turns = 1000 * mouse.norm(dim=-1)[..., None] * frequencies(128, mouse.device).double()
    return embed.mlp(torch.cat((direction, turns.sin(), turns.cos()), -1))


def cpu_product(linear, rows, silu=False):
    dense = packing.unpack_plain(linear.tiles, linear.out_features, linear.in_features)
    return F.linear(rows.float(), dense.float(), linear.bias.float()).bfloat16()


@emulated
@pytest.mark.parametrize("rope", ["motion", "ortho"])
@pytest.mark.parametrize(("packed", "n_steps"), [(False, 1), (True, 2), (True, 4)])
def test_a_frame_begins_as_the_models(launches, monkeypatch, packed, n_steps, rope):
    """No further from float64 than BF16's own operators, with every vector in its place."""
    core = make_core(rope_impl=rope).bfloat16().requires_grad_(False)
    exact = exact_core(core)
    if packed:
        pack(core)
        monkeypatch.setattr(PackedBF16Linear, "product", cpu_product)
    cache, embedded, modulate = built(core, n_steps)
    other = built(core, n_steps)[0]
    for each in (cache, other):
        each.frame.fill_(57)
    begin = FrameConditioning(core, cache, modulate, embedded)
    errors = [[], []]
    for _ in range(4):
        mouse, btn = 30 * torch.randn(1, 2), (torch.rand(1, 11) > 0.5).float()
        launches.launched.clear()
        ours, rotary = begin(mouse, btn)
        assert launches.launched == ["begin_frame", "add_controls", "plain_product"]
        theirs, other_rotary = today(core, other, modulate, embedded, mouse, btn)
        plain = StackedModulation(exact)
        want = flat(today(exact, make_cache(core, SAMPLER, KVConf(), 1), plain, embedded.double(), mouse, btn)[0])
        assert len(ours) == n_steps
        assert ours[0].out_scale.shape == theirs[0].out_scale.shape
        for error, got in zip(errors, (ours, theirs), strict=True):
            error.append(float((flat(got) - want).norm() / want.norm()))
        assert torch.equal(cache.frame, other.frame)
        assert all(torch.equal(x, other.slots[size]) for size, x in cache.slots.items())
        assert all(((a - b).abs() <= 2**-22).all() for a, b in zip(rotary, other_rotary, strict=True))
    assert sum(errors[0]) < 1.3 * sum(errors[1]), errors
    assert sum(errors[0]) < 4 * 0.02, errors


@emulated
@pytest.mark.usefixtures("fresh_compiler")
def test_a_rollout_whose_frames_begin_so(launches, monkeypatch):
    core = make_core(n_layers=2).bfloat16().requires_grad_(False)
    context, frames = make_inputs(core, 3, batch=1)
    want = play(make_rollout(core, batch=1), context, frames)
    monkeypatch.setattr(sampler, "conditioning_unfit", lambda *parts: None)
    rollout = make_rollout(core, batch=1, enabled=True, backend="eager")
    assert rollout.warmup().graphs == 1  # the step, and nothing in front of it
    launches.launched.clear()
    got = play(rollout, context, frames)
    assert launches.launched == ["begin_frame", "add_controls", "plain_product"] * 3
    assert int(rollout.cache.frame) == 4 + 3 - 1
    assert (got - want).norm() < 0.02 * want.norm()


CAPTURED = CompileConf(enabled=True, cuda_graph=True)


@pytest.fixture
def asked(monkeypatch):
    """Why a model's frames do not begin so, on a machine whose GPU and kernels are said to be there."""
    monkeypatch.setattr(cuda_linear, "unavailable", lambda device: None)
    monkeypatch.setattr(steps, "STREAMED", dict.fromkeys((4, 8, 16), 1536))

    def ask(
        core=None, change=None, batch=1, attention=AttentionKind.fused, conf=CAPTURED, embedded=None, modulate=None
    ):
        core = core or packed_core()
        if change is not None:
            change(core)
        cache = make_cache(core, SAMPLER, KVConf(), batch)
        embedded = torch.zeros(batch, 2, core.cfg.d_model).bfloat16() if embedded is None else embedded
        return conditioning_unfit(core, cache, attention, conf, modulate or StackedModulation(core), embedded)

    return ask


def packed_core(**fields):
    core = make_core(channels=16, sample_size=4, tokens_per_frame=16, **fields).bfloat16().requires_grad_(False)
    pack(core)
    return core


def test_who_begins_so(asked):
    assert asked() is None
    assert asked(packed_core(rope_impl="ortho")) is None
    streams = "not all layers are launches of ours"
    assert streams in asked(batch=2)
    assert streams in asked(attention=AttentionKind.sdpa)
    assert streams in asked(conf=CompileConf())
    assert streams in asked(make_core().bfloat16().requires_grad_(False))
    assert streams in asked(modulate=make_core().modulation)
    assert "9 steps" in asked(embedded=torch.zeros(1, 9, 64).bfloat16())
    assert "the times' embedding is torch.float32" in asked(embedded=torch.zeros(1, 2, 64))


def test_not_without_the_gpu(asked, monkeypatch):
    monkeypatch.setattr(cuda_linear, "unavailable", lambda device: "no such GPU")
    assert asked() == "no such GPU"


def test_an_unconditional_model_does_not(asked):
    assert asked(packed_core(uncond=True)) == "an unconditional model has no controls"


class Other(nn.Linear):
    """A Linear of another kind."""


def unaligned(linear):
    memory = torch.zeros(linear.weight.numel() + 1).bfloat16()
    linear.weight = nn.Parameter(memory[1:].view_as(linear.weight), requires_grad=False)
    return linear


@pytest.mark.parametrize(
    ("path", "make", "reason"),
    [
        ("control_embed", lambda old: type("Mine", (ControlEmbedding,), {})(11, 64), "embedded by Mine"),
        ("control_embed.mouse.mlp.fc2", lambda old: Other(2048, 64).bfloat16(), "is a Other"),
        ("control_embed.button.proj.act", lambda old: nn.GELU(), "is GELU"),
        ("control_embed.button.proj.fc1", lambda old: old.float(), "torch.float32"),
        ("control_embed.mouse.mlp.fc1", unaligned, "no multiple of 16"),
        ("control_embed.mouse.angle_proj", lambda old: nn.Linear(2, 256).bfloat16(), "direction none"),
        ("proj_out.norm.fc", lambda old: Other(64, 128).bfloat16(), "a modulation product is a Other"),
        ("transformer.blocks.0.gate1.fc_c", lambda old: nn.Linear(64, 72).bfloat16(), "200 outputs are not"),
    ],
)
def test_parts_that_the_kernels_do_not_take(asked, path, make, reason):
    assert reason in asked(change=lambda core: core.set_submodule(path, make(core.get_submodule(path))))


def test_modulation_that_quantises_what_it_is_given(asked, monkeypatch):
    core = packed_core()
    product = SimpleNamespace(activation_element="e4m3")
    monkeypatch.setattr(PackedBF16Linear, "fmt", product, raising=False)
    monkeypatch.setattr(steps, "streams", lambda block, rows: True)
    monkeypatch.setattr(steps, "_is_ready", lambda *args: True)
    assert "a modulation product is a PackedBF16Linear" in asked(core)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"width": 1544}, "width 1544"),
        ({"width": 4096}, "width 4096"),
        ({"steps": 9}, "9 steps"),
        ({"buttons": 257}, "257 buttons"),
    ],
)
def test_sizes_that_the_kernels_do_not_take(fields, reason):
    shape = ConditioningShape(**{**vars(SHAPE), **fields})
    assert reason in shape.unfit()
    assert SHAPE.unfit() is None


def test_a_clock_of_many_sizes_of_rings_is_refused():
    shape = ConditioningShape(64, 1, 11, 16, 16)
    assert clock_of(shape, [2, 3, 4, 5])[1].unfit(shape) is None
    assert "rings of 5 sizes" in clock_of(shape, [2, 3, 4, 5, 6])[1].unfit(shape)
    other = ConditioningShape(64, 1, 11, 4, 16)
    assert "base is torch.float32 (16, 16)" in clock_of(shape)[1].unfit(other)


def test_a_plain_product_is_the_stacked_one():
    core = make_core(n_layers=1).bfloat16().requires_grad_(False)
    (product, members, widths), = StackedModulation(core).linears.products  # fmt: skip
    assert isinstance(product, PlainProduct)
    assert len(product.weight) == sum(widths)
    assert len(members) == 5
    cache = make_cache(core, SAMPLER, KVConf(), 1)
    assert model_unfit(core, cache, StackedModulation(core).linears, torch.zeros(1, 2, 64).bfloat16()) is None


def test_on_a_cpu_a_rollout_says_why_its_frames_begin_otherwise():
    rollout = make_rollout(make_core(n_layers=1), batch=1)
    assert "not all layers are launches of ours" in rollout.conditioning_unfit


QUANTS = {
    "BF16": MXConf(),
    "MXFP8": MXConf(enabled=True, scope="all", kernel="cuda"),
    "MXFP4": MXConf(enabled=True, scope="all", kernel="cuda", bits=4),
}
SIZES = {"channels": 16, "sample_size": 8, "tokens_per_frame": 64, "n_layers": 3}


def gpu_core(dim=256, quant="BF16", **fields):
    torch.manual_seed(0)
    core = make_core(**SIZES, d_model=dim, n_heads=dim // 64, **fields).to("cuda", torch.bfloat16).requires_grad_(False)
    apply_mx(core, QUANTS[quant])
    pack(core)
    return core


def exact_gpu_core(core, **fields):
    """The same numbers in float64."""
    cfg = {name: getattr(core.cfg, name) for name in ("d_model", "n_heads", "rope_impl")}
    exact = make_core(**SIZES, **cfg, **fields).cuda().requires_grad_(False)
    for (_, _, _, linear), (_, _, _, packed) in zip(list(exact.linears()), list(core.linears()), strict=True):
        linear.weight.copy_(packed.dense_weight())
    for name, parameter in exact.named_parameters():
        if "blocks" not in name or name.endswith("bias"):
            parameter.copy_(parameter.bfloat16())
    return exact_core(exact)


class TestOnAGPU:
    pytestmark = hopper

    @pytest.mark.parametrize("dependent", [False, True])
    @pytest.mark.parametrize("n_steps", [1, 2, 4])
    @pytest.mark.parametrize(("dim", "quant"), [(1536, "BF16"), (256, "BF16"), (1536, "MXFP8"), (1536, "MXFP4")])
    @pytest.mark.parametrize("rope", ["motion", "ortho"])
    def test_a_frame_begins_as_the_models(self, dim, quant, n_steps, rope, dependent, monkeypatch):
        monkeypatch.setattr(launch, "ENABLED", dependent)
        core = gpu_core(dim, quant, rope_impl=rope)
        exact = exact_gpu_core(core)
        cache, embedded, modulate = built(core, n_steps, SamplerConf(window=6))
        other, spare = (built(core, n_steps, SamplerConf(window=6))[0] for _ in range(2))
        begin = FrameConditioning(core, cache, modulate, embedded)
        plain, errors = StackedModulation(exact), [0.0, 0.0]
        for frame in (0, 1, 2, 59, 60, 1535, 1536, 100_000):
            for each in (cache, other):
                each.frame.fill_(frame - 1)
            mouse, btn = 30 * torch.randn(1, 2, device="cuda"), (torch.rand(1, 11, device="cuda") > 0.5).float()
            ours, rotary = begin(mouse, btn)
            theirs, other_rotary = today(core, other, modulate, embedded, mouse, btn)
            want = flat(today(exact, spare, plain, embedded.double(), mouse, btn)[0])
            for i, got in enumerate((ours, theirs)):
                errors[i] += float((flat(got) - want).norm() / want.norm())
            assert torch.equal(cache.frame, other.frame)
            assert all(torch.equal(x, other.slots[size]) for size, x in cache.slots.items())
            for got, expected in zip(rotary, other_rotary, strict=True):
                torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)
        assert errors[0] < 1.3 * errors[1], errors

    def test_special_mice(self):
        core = gpu_core()
        cache, embedded, modulate = built(core)
        other = built(core)[0]
        begin = FrameConditioning(core, cache, modulate, embedded)
        btn = torch.tensor([BUTTONS], device="cuda")
        for mouse in (*MICE, (torch.nan, 0.0), (torch.inf, 1.0)):
            given = torch.tensor([mouse], device="cuda")
            got, want = flat(begin(given, btn)[0]), flat(today(core, other, modulate, embedded, given, btn)[0])
            assert torch.equal(got.isnan(), want.isnan())
            # Of sines of huge angles float32's last bit decides, and norms are rounded in one way or another.
            close = 0.3 if max(map(abs, mouse)) > 1e20 else 0.03
            assert (got - want).nan_to_num().norm() <= close * want.nan_to_num().norm()

    @pytest.mark.parametrize("dependent", [False, True])
    def test_captured_it_goes_on_from_frame_to_frame(self, dependent, monkeypatch):
        monkeypatch.setattr(launch, "ENABLED", dependent)
        core = gpu_core()
        cache, embedded, modulate = built(core)
        begin = FrameConditioning(core, cache, modulate, embedded)
        mouse, btn = torch.zeros(1, 2, device="cuda"), torch.zeros(1, 11, device="cuda")
        for _ in range(2):
            begin(mouse, btn)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ours, rotary = begin(mouse, btn)
        cache.reset()
        for frame in range(200):
            mouse.normal_()
            graph.replay()
            assert [int(x) for x in (cache.frame, *cache.slots.values())] == [frame, *(frame % r for r in cache.slots)]
            if frame % 20 == 0:
                other = built(core)[0]
                other.frame.fill_(frame - 1)
                want, expected = today(core, other, modulate, embedded, mouse, btn)
                assert (flat(ours) - flat(want)).norm() < 0.02 * flat(want).norm()
                torch.testing.assert_close(rotary, expected, rtol=0, atol=2e-6)

    @pytest.mark.usefixtures("fresh_compiler")
    def test_whole_frames_are_as_close_to_float32_as_with_the_models_operators(self, monkeypatch):
        core = gpu_core(1536, "MXFP8")
        exact = exact_gpu_core(core).float()
        del exact.control_embed.mouse.forward, exact.control_embed.button.forward
        window = SamplerConf(window=6)
        context, frames = make_inputs(core, 20, 6, batch=1)
        want = play(make_rollout(exact, window, batch=1), context, frames)
        errors, way = [], {"batch": 1, "attention": AttentionKind.fused, "enabled": True}
        for ours in (True, False):
            if not ours:
                monkeypatch.setattr(conditioning.kernels.ConditioningShape, "unfit", lambda shape: "not now")
            rollout = make_rollout(core, window, **way)
            assert (rollout.conditioning_unfit is None) is ours
            rollout.warmup()
            got = play(rollout, context, frames)
            assert int(rollout.cache.frame) == 6 + len(frames) - 1
            assert torch.equal(got, play(rollout, context, frames))
            errors.append(float((got - want).norm() / want.norm()))
        assert errors[0] < 1.15 * errors[1], errors

    @pytest.mark.usefixtures("fresh_compiler")
    def test_every_kernel_is_compiled_in_a_rehearsal(self, monkeypatch):
        asked = []
        real = kernels.compiled
        monkeypatch.setattr(kernels, "compiled", lambda *args: asked.append(args) or real(*args))
        kernels._load.cache_clear()
        rollout = make_rollout(gpu_core(), SamplerConf(window=6), batch=1, attention=AttentionKind.fused, enabled=True)
        rollout.rehearse()
        rehearsal.finish()
        assert len(asked) == 1
        rollout.warmup()
        assert len(asked) == 1
