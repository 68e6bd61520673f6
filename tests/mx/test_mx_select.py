import pytest
from torch import nn

from harness.mx.conf import MXConf
from harness.mx.select import MXTransformError, candidates, select


def chosen(model: nn.Module, **conf) -> list[str]:
    return [c.path.removeprefix("transformer.blocks.") for c in select(model, MXConf(enabled=True, **conf)).chosen]


def of_layers(*names: str, layers=(0, 1, 2)) -> set[str]:
    return {f"{layer}.{name}" for layer in layers for name in names}


MLP, ATTN = ("mlp.fc1", "mlp.fc2"), ("attn.qkv", "attn.out")
MODULATION = ("adaln1.fc", "adaln2.fc", "gate1.fc_c", "gate2.fc_c")


@pytest.mark.parametrize(
    ("scope", "names"), [("mlp", MLP), ("attn", ATTN), ("modulation", MODULATION), ("all", MLP + ATTN + MODULATION)]
)
def test_scopes(core, scope, names):
    assert set(chosen(core, scope=scope)) == of_layers(*names)


def test_every_linear_of_the_blocks_has_a_category(core):
    linears = [n for n, m in core.named_modules() if isinstance(m, nn.Linear) and n.startswith("transformer.blocks.")]
    assert [c.name for c in candidates(core)] == linears
    assert all(c.category != "other" for c in candidates(core))


def test_a_linear_without_a_category_belongs_to_scope_all_only(core):
    core.transformer.blocks[1].attn.gate = nn.Linear(64, 64)
    assert "1.attn.gate" in chosen(core, scope="all")
    assert "1.attn.gate" not in chosen(core, scope="attn")


def test_a_prefix_before_transformer_changes_nothing(core):
    full = nn.ModuleDict({"core": core})
    assert chosen(full, scope="mlp", exclude=["transformer.blocks.0.*"]) == chosen(core, scope="mlp", exclude=["*.0.*"])
    assert chosen(full, scope="mlp", exclude=["core.*.0.mlp.*"]) == chosen(core, scope="mlp", exclude=["*.0.*"])
    assert all(c.name.startswith("core.transformer.") for c in candidates(full))


@pytest.mark.parametrize(("late", "layers"), [(1, (2,)), (2, (1, 2)), (12, (0, 1, 2)), (None, (0, 1, 2))])
def test_late_layers(core, late, layers):
    assert set(chosen(core, scope="mlp", late_layers=late)) == of_layers(*MLP, layers=layers)


def test_include_extends_scope_and_late_layers(core):
    names = chosen(core, scope="mlp", late_layers=1, include=["*.blocks.0.attn.out", "*.1.mlp.fc1"])
    assert set(names) == of_layers(*MLP, layers=(2,)) | {"0.attn.out", "1.mlp.fc1"}


def test_exclude_narrows_and_wins_over_include(core):
    names = chosen(core, scope="mlp", include=["*.attn.qkv"], exclude=["*.blocks.[01].*", "*.2.attn.*"])
    assert set(names) == of_layers(*MLP, layers=(2,))


def test_four_bit_keeps_the_final_output_projections(core):
    everything = of_layers(*MLP, *ATTN, *MODULATION)
    assert set(chosen(core, scope="all", bits=4)) == everything - {"2.attn.out", "2.mlp.fc2"}
    kept = select(core, MXConf(enabled=True, scope="all", bits=4)).kept_bf16
    assert set(kept) == {"transformer.blocks.2.attn.out", "transformer.blocks.2.mlp.fc2"}
    assert all("name it in include" in reason for reason in kept.values())


def test_four_bit_transforms_the_final_output_projections_when_asked(core):
    names = chosen(core, scope="mlp", bits=4, include=["*.2.mlp.fc2"])
    assert set(names) == of_layers(*MLP)


def test_head_and_embeddings_cannot_be_included(core):
    with pytest.raises(MXTransformError, match=r"include pattern 'proj_out\.\*' matches no Linear .* always stay BF16"):
        select(core, MXConf(enabled=True, include=["proj_out.*"]))


def test_every_pattern_that_matches_nothing_is_named(core):
    with pytest.raises(MXTransformError, match=r"include pattern '\*\.qvk', exclude pattern '\*\.blocks\.7\.\*'"):
        select(core, MXConf(enabled=True, include=["*.qvk", "*.qkv"], exclude=["*.blocks.7.*"]))


def test_selecting_nothing_is_an_error(core):
    with pytest.raises(MXTransformError, match=r"selects no Linear; 6 were excluded.*Widen the scope"):
        select(core, MXConf(enabled=True, scope="mlp", exclude=["*.mlp.*"]))


def test_a_model_without_transformer_blocks_is_an_error(core):
    with pytest.raises(MXTransformError, match=r"Linear is no world model and holds none"):
        select(nn.Linear(32, 32), MXConf(enabled=True))
