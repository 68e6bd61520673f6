import copy
import json

import pytest
import torch
from torch import nn

from harness.models.gamerft import GameRFTConfig, GameRFTCore
from harness.mx.conf import CategoryBits, MXConf
from harness.mx.linears.base import MXLinear, MXModule
from harness.mx.linears.torchao import TorchaoMXLinear
from harness.mx.select import MXTransformError
from harness.mx.transform import apply_mx, check_mx


def run(core: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 2, 4, 2, 2, generator=generator).bfloat16()
    t = torch.tensor([[0.25, 1.0]]).bfloat16()
    mouse = torch.randn(1, 2, 2, generator=generator).bfloat16()
    with torch.no_grad():
        return core(x, t, mouse, torch.zeros(1, 2, 11).bfloat16())


def test_summary_says_what_was_done(core):
    before = run(core)
    summary = apply_mx(core, MXConf(enabled=True, bits=8, scope="all"))
    assert summary.count == len(summary.names) == 3 * 8
    assert summary.categories == {"modulation": 12, "attn": 6, "mlp": 6}
    assert summary.numeric_path == "W8A16 E4M3 weights, rceil scales, emulated"
    assert (summary.kernel, summary.kernel_asked, summary.emulated) == ("emulated", "auto", True)
    assert summary.architecture == "cpu"
    weights, biases = 3 * 18 * 64 * 64, 3 * (3 + 1 + 4 + 1 + 2 * 2 + 2 * 1) * 64
    assert summary.weight_bytes_before == 2 * (weights + biases)
    assert summary.weight_bytes_after == weights + weights // 32 + 2 * biases
    assert json.loads(json.dumps(summary.to_dict()))["names"] == summary.names
    after = run(core)
    assert not torch.equal(before, after)
    torch.testing.assert_close(before, after, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("conf", "path", "kind"),
    [
        ({"bits": 4, "scale_mode": "floor"}, "W4A16 E2M1 weights, floor scales, emulated", MXLinear),
        ({"bits": 8, "element_8bit": "e5m2"}, "W8A16 E5M2 weights, rceil scales, emulated", MXLinear),
        ({"bits": 8, "activation": "mx"}, "W8A8 E4M3 weights and activations, rceil scales, emulated", TorchaoMXLinear),
        ({"bits": 4, "activation": "mx"}, "W4A4 E2M1 weights and activations, rceil scales, emulated", TorchaoMXLinear),
    ],
)
def test_numeric_paths(core, conf, path, kind):
    summary = apply_mx(core, MXConf(enabled=True, scope="attn", **conf))
    assert summary.numeric_path == path
    made = [n for n, m in core.named_modules() if isinstance(m, MXModule)]
    assert made == summary.names
    assert all(type(core.get_submodule(n)) is kind for n in made)
    assert run(core).isfinite().all()


def test_categories_may_have_bits_of_their_own(core):
    conf = MXConf(enabled=True, scope="all", bits_by_category=CategoryBits(mlp=4))
    summary = apply_mx(core, conf)
    found = {n: m.fmt.element.bits for n, m in core.named_modules() if isinstance(m, MXModule)}
    assert {n for n, bits in found.items() if bits == 4} == {n for n in found if ".mlp." in n}
    assert summary.bits_by_category == {"modulation": 8, "attn": 8, "mlp": 4}
    assert summary.numeric_path == (
        "modulation and attn W8A16 E4M3 weights, rceil scales, emulated; mlp W4A16 E2M1 weights, rceil scales, emulated"
    )
    assert (summary.kernel, summary.emulated) == ("emulated", True)
    assert list(summary.kept_bf16) == ["transformer.blocks.2.mlp.fc2"], "attn.out has 8 bits, so it may be MX"
    assert "mlp W4A16 E2M1" in summary.listing()
    assert run(core).isfinite().all()


def test_everything_that_can_be_checked_is_checked_without_weights():
    def check(d_model, **conf):
        with torch.device("meta"):
            core = GameRFTCore(GameRFTConfig(n_layers=2, n_heads=2, d_model=d_model)).to(torch.bfloat16)
        check_mx(core, MXConf(enabled=True, **conf), torch.device("cpu"))

    check(64, scope="all")
    with pytest.raises(
        MXTransformError, match=r"2 of 4 selected .*\n.*blocks\.0\.mlp\.fc1: in_features=80 is not a mult"
    ):
        check(80, scope="mlp")
    with pytest.raises(MXTransformError, match="matches no Linear"):
        check(64, exclude=["*.qvk"])
    with pytest.raises(ValueError, match="kernel=cutlass cannot run"):
        check(64, kernel="cutlass")
    check_mx(torch.nn.Identity(), MXConf(), torch.device("cpu"))


def test_everything_else_stays_bf16(core):
    others = {n: p for n, p in core.named_parameters() if ".blocks." not in n}
    apply_mx(core, MXConf(enabled=True, bits=4, scope="all", include=["*"]))
    assert {n: p for n, p in core.named_parameters() if ".blocks." not in n} == others
    assert not [n for n, m in core.named_modules() if isinstance(m, nn.Linear) and ".blocks." in n]


def test_no_bf16_weight_is_left_behind(core):
    summary = apply_mx(core, MXConf(enabled=True, bits=4, scope="all", include=["*"]))
    held = sum(t.nbytes for t in [*core.transformer.parameters(), *core.transformer.buffers()])
    assert held == summary.weight_bytes_after


def test_disabled_changes_nothing(core):
    before = copy.deepcopy(core.state_dict())
    summary = apply_mx(core, MXConf(enabled=False, bits=4))
    assert (summary.enabled, summary.numeric_path, summary.count, summary.kernel) == (False, "BF16", 0, "torch")
    assert all(torch.equal(before[k], v) for k, v in core.state_dict().items())


def test_all_unsuitable_linears_are_named_and_nothing_changes(core):
    blocks = core.transformer.blocks
    blocks[0].mlp.fc1 = nn.Linear(64, 48).bfloat16()
    blocks[0].mlp.fc2 = nn.Linear(48, 64).bfloat16()
    blocks[1].mlp.fc1 = nn.Linear(64, 256)
    blocks[1].mlp.fc2 = nn.Identity()
    with torch.no_grad():
        blocks[2].mlp.fc1.weight[3, 5] = torch.nan
    before = list(core.modules())
    with pytest.raises(
        MXTransformError, match=r"4 of 6 selected Linears cannot become MX \(nothing was changed\)"
    ) as e:
        apply_mx(core, MXConf(enabled=True, scope="mlp"))
    message = str(e.value)
    assert "transformer.blocks.0.mlp.fc2: in_features=48 is not a multiple of 32" in message
    assert "transformer.blocks.1.mlp.fc1: its weight is torch.float32" in message
    assert "transformer.blocks.1.mlp.fc2: is of type Identity, not a plain nn.Linear" in message
    assert "transformer.blocks.2.mlp.fc1: its weight holds NaN or infinity" in message
    assert "blocks.0.mlp.fc1" not in message
    assert list(core.modules()) == before


def test_a_linear_used_twice_is_named(core):
    core.transformer.blocks[1].mlp.fc1 = core.transformer.blocks[0].mlp.fc1
    with pytest.raises(MXTransformError, match=r"blocks\.1\.mlp\.fc1: the same module is used under several names"):
        apply_mx(core, MXConf(enabled=True, scope="mlp"))


@pytest.mark.parametrize("activation", ["bf16", "mx"])
def test_transforming_twice_is_an_error(core, activation):
    conf = MXConf(enabled=True, scope="mlp", activation=activation)
    apply_mx(core, conf)
    with pytest.raises(MXTransformError, match=r"is of type \w*MXLinear, not a plain nn\.Linear"):
        apply_mx(core, conf)


def test_a_bad_config_or_kernel_fails_before_the_model_is_touched(core):
    with pytest.raises(ValueError, match="bits=16"):
        apply_mx(core, MXConf(enabled=True, bits=16))
    with pytest.raises(ValueError, match=r"kernel=cutlass cannot run .*needs an NVIDIA Blackwell GPU.*kernel=emulated"):
        apply_mx(core, MXConf(enabled=True, activation="mx", kernel="cutlass"))
    assert not [m for m in core.modules() if isinstance(m, MXModule)]


def test_a_model_of_another_precision_is_refused(core):
    with pytest.raises(MXTransformError, match=r"torch\.float32, MX Linears take bfloat16 models"):
        apply_mx(core.float(), MXConf(enabled=True))


def test_train_mode_is_carried_over(core):
    core.transformer.blocks[0].mlp.fc1.train()
    apply_mx(core, MXConf(enabled=True, scope="mlp"))
    assert [m.training for m in core.modules() if isinstance(m, MXModule)] == [True] + 5 * [False]
