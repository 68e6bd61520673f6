"""Who chooses an MX Linear's blocks: any source, of any model, and back again."""

import copy

import pytest
import torch

from harness.formats.mx import E2M1, E4M3, E5M2, MXBlocks
from harness.formats.scales import ScaleMode
from harness.models.gamerft import GameRFTCore
from harness.mx.conf import Activation, MXConf
from harness.mx.linears import cuda as cuda_linear
from harness.mx.linears.base import LinearFormat, MXLinear, MXModule, MXWeight
from harness.mx.linears.torchao import TorchaoMXLinear
from harness.mx.linears.triton import TritonMXLinear
from harness.mx.select import MXTransformError
from harness.mx.transform import apply_mx, check_mx
from harness.mx.weights import nearest

MODULES = {
    "emulated": MXLinear,
    "torchao": lambda weight: TorchaoMXLinear.from_weight(weight, native=False),
    "triton": TritonMXLinear.from_weight,
    "cuda": cuda_linear.build,
}


class Kept:
    """Weights as an earlier model had them, by name."""

    def __init__(self, model):
        self.weights = {n: m.mx_weight() for n, m in model.named_modules() if isinstance(m, MXModule)}
        self.asked = []

    chosen_by = ""

    def unsuitable(self, name, linear, fmt):
        return None if name in self.weights else "the file does not hold it"

    def weight(self, name, linear, fmt):
        assert linear.weight.is_meta
        assert fmt == self.weights[name].fmt
        self.asked.append(name)
        return self.weights[name]


def bits(tensor):
    """The bytes of a tensor, of torchao's MXTensor those of its parts."""
    parts = (tensor.qdata, tensor.scale) if hasattr(tensor, "qdata") else (tensor,)
    return [part.contiguous().view(torch.uint8) for part in parts]


@pytest.mark.parametrize("fmt", [E4M3, E5M2, E2M1], ids=lambda f: f.name)
@pytest.mark.parametrize("build", MODULES.values(), ids=MODULES)
def test_every_module_is_made_anew_from_what_it_gives_back(build, fmt):
    torch.manual_seed(0)
    linear = torch.nn.Linear(96, 80).bfloat16().requires_grad_(False)
    linear.weight[3, :32] = 0
    weight = nearest(linear, LinearFormat(fmt, ScaleMode.rceil, Activation.mx))
    module = build(weight)
    given = module.mx_weight()
    assert given.fmt == weight.fmt
    assert torch.equal(given.bias, linear.bias)
    assert torch.equal(given.blocks.elements, weight.blocks.elements)
    again = build(given)
    assert type(again) is type(module)
    for (name, one), (_, other) in zip(module.state_dict().items(), again.state_dict().items(), strict=True):
        assert all(map(torch.equal, bits(one), bits(other))), name


def test_a_model_of_kept_blocks_is_built_without_its_bf16_weights(core):
    conf = MXConf(enabled=True, bits=4, scope="all", include=["*"])
    kept = copy.deepcopy(core)
    want = apply_mx(kept, conf)
    source = Kept(kept)
    loaded = GameRFTCore.skeleton(core.cfg, torch.device("cpu"))
    got = apply_mx(loaded, conf, source, torch.device("cpu"))
    assert source.asked == want.names
    assert got == want  # every figure of the summary
    rest = {name: value for name, value in core.state_dict().items() if name in loaded.state_dict()}
    loaded.load_state_dict(rest, strict=False, assign=True)
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    x, t = torch.randn(1, 2, 4, 2, 2), torch.rand(1, 2)
    controls = torch.randn(1, 2, 2), torch.ones(1, 2, core.cfg.n_buttons)
    with torch.no_grad():
        assert torch.equal(loaded(x, t, *controls), kept(x, t, *controls))


def test_a_source_without_a_weight_is_named_before_anything_changes(core):
    conf = MXConf(enabled=True)
    source = Kept(core)
    with pytest.raises(MXTransformError, match=r"blocks\.0\.mlp\.fc1: the file does not hold it"):
        apply_mx(core, conf, source)
    with pytest.raises(MXTransformError, match="6 of 6"):
        check_mx(core, conf, torch.device("cpu"), source)
    assert not any(isinstance(module, MXModule) for module in core.modules())


def test_blocks_that_nobody_rounded_are_multiplied_as_they_are():
    blocks = MXBlocks(torch.full((16, 16), 0x22, dtype=torch.uint8), torch.full((16, 1), 128, dtype=torch.uint8))
    mx = MXLinear(MXWeight(blocks, None, LinearFormat(E2M1, ScaleMode.rceil, Activation.bf16)))
    assert torch.equal(mx(torch.ones(1, 32).bfloat16()), torch.full((1, 16), 64.0).bfloat16())
