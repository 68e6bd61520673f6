"""An exported checkpoint rolls out what was judged, bit for bit, and is refused when it is anything else."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from harness.config import ROOT
from harness.config.compose import compose
from harness.export.layout import KEY, ExportError, ExportHeader, header_digest
from harness.export.read import Export, is_export
from harness.export.write import weights_fingerprint, write_export
from harness.formats.mx import decode
from harness.kv import KVConf
from harness.models.checkpoint import random_gamerft
from harness.models.gamerft import GameRFTConfig
from harness.mx.conf import CategoryBits, MXConf
from harness.mx.linears.base import MXModule
from harness.mx.transform import apply_mx
from harness.rollout import SamplerConf
from harness.rollout.assembly import RolloutSetup, assemble

CFG = GameRFTConfig(n_layers=2, n_heads=2, d_model=64, channels=4, sample_size=2, tokens_per_frame=4, n_buttons=3)
SETUP = RolloutSetup(batch=1, sampler=SamplerConf(window=3))
FORMATS = {
    "mxfp8_all": MXConf(enabled=True, bits=8, scope="all"),
    "mxfp8_e5m2": MXConf(enabled=True, bits=8, scope="mlp", element_8bit="e5m2"),
    "mxfp4_all": MXConf(enabled=True, bits=4, scope="all"),
    "mixed": MXConf(enabled=True, bits=8, scope="all", bits_by_category=CategoryBits(mlp=4)),
    "W8A8": MXConf(enabled=True, bits=8, scope="mlp", activation="mx"),
}


def plain(conf):
    return dataclasses.asdict(conf) | {"kernel": "auto", "list": False}


def header(quant, **changed):
    fields = {
        "model": dataclasses.asdict(CFG),
        "vae_scale": 0.5,
        "quant": plain(quant),
        "kv": {"storage": "bf16"},
        "sampler": dataclasses.asdict(SETUP.sampler),
        "calibration": {},
        "label": "mx",
        "verdict": {"verdict": "ship"},
        "quantization_config": {},
    }
    return ExportHeader(**{**fields, **changed})


def core():
    return random_gamerft(CFG, 1).to(torch.bfloat16)


def frames(model, quant, source=None, count=3):
    """Latents of a rollout, and what rolled it out."""
    assembled = assemble(model, quant, KVConf(), SETUP, source)
    random = torch.Generator().manual_seed(0)
    shape = (1, CFG.channels, CFG.sample_size, CFG.sample_size)
    history, noise = (torch.randn(1, 3, *shape[1:], generator=random) for _ in range(2))
    mouse, btn = torch.randn(1, 3, 2, generator=random), torch.ones(1, 3, CFG.n_buttons)
    assembled.rollout.prefill(history, mouse, btn, noise)
    latents = [
        assembled.rollout.next_frame(torch.randn(shape, generator=random), mouse[:, 0], btn[:, 0]) for _ in range(count)
    ]
    return torch.stack(latents), assembled.core


@pytest.fixture(params=FORMATS)
def exported(request, tmp_path):
    """Format, the judged latents, the model that rolled them out, and its file."""
    quant, path = FORMATS[request.param], tmp_path / "out" / "model.safetensors"
    judged, model = frames(core(), quant)
    write_export(model, header(quant), path)
    return quant, judged, model, path


def test_what_was_judged_comes_back_bit_for_bit(exported):
    quant, judged, model, path = exported
    export = Export(path)
    assert dataclasses.asdict(export.quant) == plain(quant)
    assert export.arch == CFG
    cpu = torch.device("cpu")
    again, loaded = frames(export.skeleton(cpu), export.quant, export.source(cpu))
    assert torch.equal(again, judged)
    assert weights_fingerprint(loaded) == weights_fingerprint(model) == export.header.fingerprint


@pytest.mark.parametrize(
    ("by", "called"), [({}, "mxfp4_all_mx_v_only"), ({"method": "gptq"}, "mxfp4_all_gptq_mx_v_only")]
)
def test_a_run_of_the_file_is_named_after_the_formats_in_it(tmp_path, by, called):
    path, cache = tmp_path / "model.safetensors", {"storage": "mx", "quantize_k": False}
    _, model = frames(core(), FORMATS["mxfp4_all"])
    write_export(model, header(FORMATS["mxfp4_all"], kv=cache, calibration=by), path)

    def folder():
        return compose("model=doom", f"model.checkpoint={path}").__dict__["hydra_part"].runtime.output_dir

    assert folder().endswith(f"_doom_{called}")
    content = bytearray(path.read_bytes())
    content = content.replace(b"late_layers", b"late_lazers")
    path.write_bytes(content)  # the plan refuses it; a name is no place to do so
    assert folder().endswith("_doom_bf16_bf16")


def test_no_weight_of_an_mx_linear_is_ever_bf16(exported):
    _quant, _, _, path = exported
    export = Export(path)
    skeleton = export.skeleton(torch.device("cpu"))
    selected = [name for name, module in core().named_modules() if f"{name}.weight_scale" in export.header.digests]
    assert all(skeleton.get_submodule(name).weight.is_meta for name in selected)
    summary = apply_mx(skeleton, export.quant, export.source(torch.device("cpu")))
    assert summary.names == selected
    assert not any(tensor.is_meta for tensor in skeleton.state_dict().values())


def test_names_and_types_are_those_of_compressed_tensors(exported):
    _quant, _, _model, path = exported
    tensors = load_file(path)
    config = Export(path).header.quantization_config
    assert config["quant_method"] == "compressed-tensors"
    for group in config["config_groups"].values():
        for name in group["targets"]:
            scale = tensors[f"{name}.weight_scale"]
            assert scale.dtype is torch.uint8
            if group["format"] == "mxfp4-pack-quantized":
                assert tensors[f"{name}.weight_packed"].dtype is torch.uint8
                assert tensors[f"{name}.weight_packed"].shape[1] * 2 == scale.shape[1] * 32
            else:
                assert tensors[f"{name}.weight"].dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
    assert not set(config["ignore"]) & {name for g in config["config_groups"].values() for name in g["targets"]}


def test_the_loader_in_the_docs_decodes_every_weight(exported):
    _, _, model, path = exported
    page = (ROOT / "docs" / "export.md").read_text()
    code = page.split("<!-- loader -->\n```python\n")[1].split("```")[0]
    space = {}
    exec(code, space)  # the documented lines themselves
    found = space["load"](path)
    for name, module in model.named_modules():
        if isinstance(module, MXModule):
            expected = decode(module.weight_blocks(), module.fmt.element, torch.float32)
            assert torch.equal(torch.from_numpy(found[f"{name}.weight"].copy()), expected), name
    assert torch.equal(torch.from_numpy(found["proj_in.weight"].copy()), model.proj_in.weight.float())


def test_the_same_weights_are_the_same_bytes_in_another_process(tmp_path):
    code = (
        "import sys; sys.path[:0] = ['tests/export']; import test_export as t; from pathlib import Path\n"
        "quant = t.FORMATS['mixed']; model = t.core(); t.apply_mx(model, quant)\n"
        "t.write_export(model, t.header(quant), Path(sys.argv[1]))"
    )
    here, there = tmp_path / "here.safetensors", tmp_path / "there.safetensors"
    subprocess.run([sys.executable, "-c", code, str(there)], cwd=ROOT, check=True, timeout=120)
    quant, model = FORMATS["mixed"], core()
    apply_mx(model, quant)
    write_export(model, header(quant), here)
    assert here.read_bytes() == there.read_bytes()


def rewritten(path, change, sealed=True):
    """The file again, with what ``change(tensors, header)`` does to it; ``sealed``: the header's own digest follows."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        content = json.loads(file.metadata()[KEY])
    change(tensors, content)
    if sealed:
        content["sha256"] = header_digest(content)
    save_file(tensors, path, {KEY: json.dumps(content)})


def flip(tensors, _):
    tensors["transformer.blocks.0.mlp.fc1.weight_scale"][0, 0] ^= 1


def drop(tensors, _):
    del tensors["transformer.blocks.0.mlp.fc1.bias"]


def swap_format(_, content):
    content["quant"]["bits"] = 8


def wider(_, content):
    content["model"]["d_model"] = 128


def huge(_, content):
    content["model"]["n_layers"] = 10**9


def newer(_, content):
    content["version"] = 3


def stray(tensors, content):
    tensors["extra"] = torch.zeros(1)
    content["digests"]["extra"] = "0"


@pytest.mark.parametrize("change", [flip, drop, swap_format, wider, huge, newer, stray])
def test_a_changed_file_is_refused(change, tmp_path):
    quant, path = FORMATS["mxfp4_all"], tmp_path / "model.safetensors"
    model = core()
    apply_mx(model, quant)
    write_export(model, header(quant), path)
    rewritten(path, change)
    cpu = torch.device("cpu")

    def load():
        export = Export(path)
        apply_mx(export.skeleton(cpu), export.quant, export.source(cpu))

    with pytest.raises(ExportError, match=r"model\.safetensors"):
        load()


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("verdict", "verdict", "do not ship"),
        ("calibration", "method", "gptq"),
        ("sampler", "seed", 7),
        ("kv", "enabled", True),
        (None, "label", "mxfp8_all"),
        (None, "vae_scale", 0.25),
        (None, "sha256", None),
    ],
)
def test_a_header_that_says_something_else_than_was_exported_is_refused(section, field, value, tmp_path):
    quant, path = FORMATS["mxfp4_all"], tmp_path / "model.safetensors"
    model = core()
    apply_mx(model, quant)
    write_export(model, header(quant), path)
    Export(path)

    def change(_, content):
        (content[section] if section else content)[field] = value

    rewritten(path, change, sealed=False)
    with pytest.raises(ExportError, match=r"model\.safetensors: header: not what was exported"):
        Export(path)


def test_other_files_are_no_exports(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\xff" * 20)
    for name in ("plain.safetensors", "cut.safetensors", "absent.safetensors"):
        assert not is_export(tmp_path / name)
        with pytest.raises(ExportError, match=name):
            Export(tmp_path / name)
    with pytest.raises(ExportError, match="no Linear of this model is MX"):
        write_export(core(), header(FORMATS["mixed"]), tmp_path / "bf16.safetensors")
    assert not (tmp_path / "bf16.safetensors").exists()
