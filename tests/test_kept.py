"""BF16's frames and the latents of clips, found again where nothing has changed and never where anything has."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from harness.ab.kept import KeptFrames
from harness.config import ConfigError, plan_run
from harness.config.plan import _reuse_problems
from harness.data.kept import KeptEncoder
from harness.files import kept
from harness.files.digest import Digest
from harness.files.kept import StaleError, Store
from harness.judge import gates_conf
from harness.models.config_io import dcae_config
from harness.models.dcae import DCAEEncoder
from harness.report.gates import evaluate
from harness.report.record import load_record
from harness.rollout import AttentionKind
from harness.rollout.attention import FRAME_ATTENTION
from harness.run import run


@pytest.fixture
def reusing(game, overrides, tmp_path):
    """Words of a run that reuses what lies in this test's own folder."""
    return [*overrides(game), "measure.reuse_bf16=true", f"measure.kept={tmp_path / 'kept'}"]


@pytest.fixture(scope="module")
def rolled_once(game, overrides, recorded, tmp_path_factory):
    """A run of BF16 alone, and where it left its frames."""
    folder = tmp_path_factory.mktemp("rolled_once")
    kept = folder / "kept"
    words = [*overrides(game), "measure.reuse_bf16=true", f"measure.kept={kept}", "quant=bf16"]
    return recorded(folder, *words), kept


@pytest.fixture
def first(rolled_once, tmp_path):
    """A run of BF16 alone, which left its frames in this test's own folder."""
    found, kept = rolled_once
    shutil.copytree(kept, tmp_path / "kept")
    return found


def frames_of(tmp_path):
    return sorted((tmp_path / "kept" / "bf16").glob("*.safetensors"))


def test_a_candidate_has_the_same_scores_beside_reused_frames(first, reusing, record, game, overrides, tmp_path):
    assert first.timings[0].bf16_from is None
    assert first.arms["bf16"].speed.dit_ms is not None
    rolled = record(*overrides(game), "quant=mxfp4_mlp", "kv=mx_v_only")
    rows = (tmp_path / "run" / "frames.csv").read_text().splitlines()
    found = record(*reusing, "quant=mxfp4_mlp", "kv=mx_v_only")
    assert [clip.scores for clip in found.clips] == [clip.scores for clip in rolled.clips]
    assert [clip.appearance for clip in found.clips] == [clip.appearance for clip in rolled.clips]
    assert found.incidents == rolled.incidents
    assert found.arms["bf16"].memory.weight_bytes == rolled.arms["bf16"].memory.weight_bytes
    untimed = [",".join(row.split(",")[:4] + row.split(",")[7:]) for row in rows]
    again = (tmp_path / "run" / "frames.csv").read_text().splitlines()
    assert [",".join(row.split(",")[:4] + row.split(",")[7:]) for row in again] == untimed
    assert all(",,,".join(["", ""]) in row for row in again if ",bf16," in row)


def test_the_record_says_whose_frames_they_are_and_has_no_times_of_them(first, reusing, record, tmp_path):
    found = record(*reusing, "quant=mxfp4_mlp")
    assert all(list(batch.arms) == ["candidate"] == batch.order for batch in found.timings)
    assert {batch.bf16_from.run for batch in found.timings} == {first.run_id}
    speed = found.arms["bf16"].speed
    assert speed.dit_ms is speed.decoder_ms is speed.prefill_ms is speed.pipeline_fps is None
    assert found.arms["candidate"].speed.dit_ms.n == 6
    rolled = found.timings[0].bf16_from.rolled
    (note,) = [note for note in found.notes if "reused" in note]
    assert note.startswith(
        f"BF16's frames of 2 of 2 batches are reused from run {first.run_id}, rolled out at {rolled}"
    )
    for name in ("table.txt", "report.html"):
        assert "reused from run" in (tmp_path / "run" / name).read_text().replace("\n", " ")


@pytest.mark.parametrize(
    "changed", ["seed=1", "sampler.context_noise=0.2", "data.future_frames=3", "attention=flex", "data.batch_size=2"]
)
def test_nothing_is_reused_where_a_setting_differs(first, reusing, record, changed, monkeypatch):
    # The setting is what counts, and FlexAttention would be compiled for half a minute.
    monkeypatch.setitem(FRAME_ATTENTION, AttentionKind.flex, FRAME_ATTENTION[AttentionKind.sdpa])
    found = record(*reusing, "quant=mxfp4_mlp", changed)
    assert all(batch.bf16_from is None and set(batch.arms) == {"bf16", "candidate"} for batch in found.timings)


def test_nothing_is_reused_by_other_code_threads_or_weights(first, reusing, record, monkeypatch):
    import harness.ab.kept as room

    for name, other in (("what_computes", lambda: {"threads": 64}), ("asdict", lambda conf: "another")):
        with monkeypatch.context() as changed:
            changed.setattr(room, name, other)
            assert record(*reusing, "quant=mxfp4_mlp").timings[0].bf16_from is None
    with monkeypatch.context() as changed:
        changed.setattr(Digest, "code", lambda self, rooms=(): self.settings(code="another"))
        assert record(*reusing, "quant=mxfp4_mlp").timings[0].bf16_from is None
    assert record(*reusing, "quant=mxfp4_mlp").timings[0].bf16_from is not None


def damaged(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def forged(path):
    """Frames that are no longer what this machine gives, under a digest that fits them."""
    frames = load_file(path)["rgb"] + 0.25
    said = json.dumps({"run": "another", "rolled": "2026-01-01T00:00:00+00:00"})
    kept.keep(path, {"rgb": frames}, said)


@pytest.mark.parametrize(
    ("harm", "said"),
    [(damaged, "its content is not what was stored"), (forged, "this machine does not give the kept frames' bits")],
)
def test_frames_that_were_altered_are_refused_and_rolled_out_again(first, reusing, record, tmp_path, harm, said):
    for path in frames_of(tmp_path):
        harm(path)
    found = record(*reusing, "quant=mxfp4_mlp")
    assert all(batch.bf16_from is None for batch in found.timings)
    assert [clip.scores["bf16"] for clip in found.clips] == [clip.scores["bf16"] for clip in first.clips]
    assert said in (tmp_path / "run" / "run.log").read_text()
    assert record(*reusing, "quant=mxfp8_mlp").timings[0].bf16_from is not None  # what was refused is replaced


def test_frames_that_are_not_finite_are_not_kept(reusing, composed, monkeypatch, tmp_path):
    plain = KeptFrames.roll

    def roll(self, *args):
        monkeypatch.setattr(self.arm, "decode", lambda latent: torch.full((1, 3, 32, 32), torch.nan))
        return plain(self, *args)

    monkeypatch.setattr(KeptFrames, "roll", roll)
    with pytest.raises(Exception, match="NaN"):
        run(composed(*reusing))
    assert not frames_of(tmp_path)


def test_speed_is_never_judged_by_reused_frames(first, reusing, record, composed, tmp_path):
    with pytest.raises(ConfigError, match=r"measure.reuse_bf16=true and a gate that asks for speed"):
        plan_run(composed(*reusing, "quant=mxfp8_mlp", "gates=a"))
    plan_run(composed(*reusing, "quant=mxfp8_mlp", "gates=a", "gates.without=[speed]"))
    found = record(*reusing, "kv=mx_v_only")  # its kernels are real: beside a rolled BF16 its speed would count
    (speed,) = [one for one in evaluate(found, gates_conf("a", None, [])).checks if one.criterion == "speed"]
    assert speed.status == "not_measured"
    assert speed.value is None


def test_a_gpu_rolls_bf16_out(composed, reusing):
    conf = plan_run(composed(*reusing)).conf
    assert list(_reuse_problems(conf, torch.device("cpu"))) == []
    (problem,) = _reuse_problems(conf, torch.device("cuda"))
    assert "on a CPU alone" in problem


def test_latents_are_those_that_the_encoder_gave(tmp_path, monkeypatch):
    torch.manual_seed(0)
    cfg = dcae_config({"sample_size": 32, "latent_size": 4, "latent_channels": 8, "ch_0": 8, "ch_max": 16,
                       "encoder_blocks_per_stage": [1, 1, 1], "decoder_blocks_per_stage": [1, 1, 1]})  # fmt: skip
    encoder = DCAEEncoder(cfg).eval().requires_grad_(False)
    frames = torch.rand(2, 3, 32, 32)
    expected = encoder(frames)
    assert torch.equal(KeptEncoder(encoder, tmp_path, {})(frames), expected)
    other = KeptEncoder(encoder, tmp_path, {"threads": 2})
    monkeypatch.setattr(DCAEEncoder, "forward", lambda self, x: pytest.fail("encoded again"))
    assert torch.equal(KeptEncoder(encoder, tmp_path, {})(frames), expected)
    for encode, x in ((other, frames), (KeptEncoder(encoder, tmp_path, {}), frames + 1)):
        with pytest.raises(pytest.fail.Exception, match="encoded again"):
            encode(x)


def test_a_store_stays_below_its_size_and_what_was_not_used_goes_first(tmp_path):
    store = Store(tmp_path, 2500)
    tensors = {"x": torch.zeros(800, dtype=torch.uint8)}
    shapes = {"x": ((800,), torch.uint8)}
    for number, key in enumerate("ab"):
        store.keep(key, tensors, "")
        os.utime(tmp_path / f"{key}.safetensors", (number, number))
    assert store.find("a", shapes) is not None  # used: b is now the oldest
    store.keep("c", tensors, "")
    assert sorted(path.stem for path in tmp_path.glob("*.safetensors")) == ["a", "c"]
    store.keep("large", {"x": torch.zeros(4000, dtype=torch.uint8)}, "")
    assert store.find("large", {"x": ((4000,), torch.uint8)}) is None
    with pytest.raises(StaleError, match="its tensors are not those"):
        store.find("a", {"x": ((400,), torch.float16)})
    (tmp_path / "a.safetensors").rename(tmp_path / "d.safetensors")
    with pytest.raises(StaleError, match="its content is not what was stored"):
        store.find("d", shapes)


def test_a_killed_run_goes_on_with_reused_frames(first, reusing, composed, tmp_path, monkeypatch):
    plain, done = KeptFrames.roll, []

    def roll(self, *args):
        done.append(None)
        if len(done) == 2:
            raise RuntimeError("killed")
        return plain(self, *args)

    with monkeypatch.context() as changed:
        changed.setattr(KeptFrames, "roll", roll)
        with pytest.raises(RuntimeError, match="killed"):
            run(composed(*reusing, "quant=mxfp4_mlp", "overwrite=true"))
    run(composed(*reusing, "quant=mxfp4_mlp", "resume=true"))
    found = load_record(tmp_path / "run" / "record.json")
    assert [batch.bf16_from is not None for batch in found.timings] == [True, True]
