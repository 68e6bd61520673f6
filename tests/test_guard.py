"""Instabilities of whole runs: faults put into a candidate, and what the run makes of them."""

import dataclasses
import functools
import shutil
from types import SimpleNamespace

import pytest
import torch

from harness.ab.arm import Arm
from harness.ab.guard import Guard
from harness.config import plan_run
from harness.measure.pictures import Pictures
from harness.measure.stability import Incident, InstabilityError
from harness.report.record import load_record
from harness.rollout import assembly
from harness.run import run


@pytest.fixture
def broken_mxfp4(monkeypatch):
    """Every MXFP4 model gives NaN in one layer, from the first generated frame on."""
    plain = assembly.apply_mx

    def apply(core, conf, source):
        summary = plain(core, conf, source)
        if conf.enabled and conf.bits == 4:
            tokens = core.cfg.tokens_per_frame
            hook = lambda module, inputs, output: output * torch.nan if inputs[0].shape[1] == tokens else output  # noqa: E731
            core.blocks[1].mlp.fc1.register_forward_hook(hook)
        return summary

    monkeypatch.setattr("harness.rollout.assembly.apply_mx", apply)


@pytest.fixture
def black_candidate(monkeypatch):
    """An arm with a quantised cache shows black frames from the second on, in the clip that the fixture is given."""
    plain = Arm.roll

    def use(clip):
        def roll(self, batch, *args, **options):
            rolled = plain(self, batch, *args, **options)
            if self.kv.enabled and clip in batch.clip_ids:
                rgb = rolled.pictures.rgb()
                rgb[batch.clip_ids.index(clip), 1:] = -1
                rolled = dataclasses.replace(rolled, pictures=Pictures.of(rgb))
            return rolled

        monkeypatch.setattr(Arm, "roll", roll)

    return use


LAYER = "transformer.blocks.1.mlp.fc1"


def test_nan_ends_the_run_and_names_arm_clip_frame_and_layer(composed, game, overrides, tmp_path, broken_mxfp4):
    with pytest.raises(InstabilityError, match=rf"arm candidate: clip clip_0 .* frame 0 .*first in {LAYER}\."):
        run(composed(*overrides(game), "quant=mxfp4_mlp"))
    found = load_record(tmp_path / "run" / "record.json")
    assert found.status == "failed"
    (incident,) = found.incidents
    assert (incident.kind, incident.layer, incident.action) == ("non_finite", LAYER, "run ended")


def test_fallback_rebuilds_the_candidate_and_says_what_each_clip_ran_with(record, game, overrides, broken_mxfp4):
    found = record(*overrides(game), "quant=mxfp4_mlp", "on_instability=fallback")
    assert found.status == "complete"
    assert [clip.fallback for clip in found.clips] == ["MXFP4 off, 8 bits instead"] * 2
    (taken,) = found.fallbacks
    assert (taken.clip, taken.quant["bits"], taken.kv["storage"]) == ("clip_0", 8, "bf16")
    (incident,) = found.incidents
    assert incident.action == "fallback: MXFP4 off, 8 bits instead"
    assert "E4M3" in found.candidate.numeric_path.linears
    assert found.candidate.label == "mxfp4_mlp (MXFP4 off, 8 bits instead)"
    assert found.quality.all.fidelity.psnr > 20


def test_finished_clips_keep_what_they_ran_with(record, game, overrides, black_candidate):
    black_candidate("clip_3")
    found = record(*overrides(game), "kv=mx_v_only", "on_instability=fallback", "quant=mxfp8_mlp")
    assert [clip.fallback for clip in found.clips] == [None, "KV cache back to BF16"]
    assert [taken.step for taken in found.fallbacks] == [
        "only the last 1 layers of the KV cache",
        "KV cache back to BF16",
    ]
    assert [incident.clip for incident in found.incidents] == ["clip_3"] * 2


def test_record_goes_on_and_the_gate_fails(record, game, overrides, black_candidate, tmp_path):
    black_candidate("clip_0")
    found = record(*overrides(game), "kv=mx_v_only", "on_instability=record", "gates=d", "gates.min_clips=1")
    assert len(found.clips) == 2
    assert [(one.kind, one.frame, one.action) for one in found.incidents] == [("black", 1, "recorded")]
    assert found.gates.verdict == "do not ship"
    log = (tmp_path / "incidents.log").read_text()
    for text in ("Hardware/Software:", "Transform summary:", "Metrics:", "Quality:", "black frames"):
        assert text in log


def test_a_clip_with_nan_is_left_out_and_the_others_of_its_batch_kept(record, game, overrides, monkeypatch):
    from harness.rollout import Rollout

    plain, frames = Rollout.next_frame, []

    def poisoned(self, *args):
        frames.append(None)
        latent = plain(self, *args)
        if len(frames) == 6:  # the candidate's second frame
            latent[0] = torch.nan
        return latent

    monkeypatch.setattr(Rollout, "next_frame", poisoned)
    found = record(*overrides(game), "kv=mx_v_only", "on_instability=record", "data.batch_size=2")
    assert [clip.clip_id for clip in found.clips] == ["clip_3"]
    (incident,) = found.incidents
    assert (incident.clip, incident.frame, incident.layer) == ("clip_0", 1, None)
    assert "no layer shows it" in incident.message


@pytest.fixture
def overflowing(monkeypatch):
    """The decoder gives infinities and NaN for finite latents, in one arm's second frame of one clip."""
    plain = Arm.roll

    def use(clip, quantised):
        def roll(self, batch, *args):
            decode, calls = self.decode, []

            def overflow(latent):
                calls.append(latent)
                picture = decode(latent)
                if len(calls) == 2 and clip in batch.clip_ids and self.kv.enabled == quantised:
                    picture = picture.clone()
                    picture[batch.clip_ids.index(clip), 0, :2] = torch.tensor([[torch.inf], [torch.nan]])
                return picture

            self.decode = overflow
            try:
                return plain(self, batch, *args)
            finally:
                self.decode = decode

        monkeypatch.setattr(Arm, "roll", roll)

    return use


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("quantised", [True, False])
def test_pictures_that_are_not_finite_cost_their_clip_alone(
    composed, game, overrides, tmp_path, overflowing, quantised, batch
):
    """And the record, page and all clips that were finished are there, whichever arm it is."""
    words = [*overrides(game, **{"data.limit": 3, "measure.videos": "true"}), "kv=mx_v_only"]
    words += ["on_instability=record", f"data.batch_size={batch}"]
    overflowing("clip_3", quantised)
    arm = "candidate" if quantised else "bf16"
    if quantised:
        run(composed(*words))
    else:  # nothing can be judged against such a BF16
        with pytest.raises(InstabilityError, match="arm bf16: clip clip_3"):
            run(composed(*words))
    found = load_record(tmp_path / "run" / "record.json")
    others = [clip.clip_id for clip in found.clips]
    assert "clip_3" not in others
    assert "clip_0" in others or (batch == 2 and not quantised)
    (incident,) = found.incidents
    assert (incident.kind, incident.arm, incident.clip, incident.frame) == ("non_finite", arm, "clip_3", 1)
    assert "in the decoder's picture of finite latents" in incident.message
    page = (tmp_path / "run" / "report.html").read_text()
    assert "in the decoder&#39;s picture of finite latents" in page
    assert "could not be drawn" not in page
    assert page.count('<figure class="player"') == len(others)


def test_bf16_itself_has_nothing_to_fall_back_to(composed, game, overrides, monkeypatch):
    from harness.rollout import Rollout

    monkeypatch.setattr(Rollout, "next_frame", lambda self, noise, *args: torch.full_like(noise, torch.inf))
    with pytest.raises(InstabilityError, match="arm bf16: clip clip_0"):
        run(composed(*overrides(game), "kv=mx_v_only", "on_instability=fallback"))


@pytest.mark.parametrize("name", ["gate_a", "gate_d"])
def test_a_gate_experiment_ends_with_a_verdict(record, game, overrides, name):
    words = overrides(game, **{"data.limit": 3})
    found = record(*words, f"experiment={name}", "gates.max_psnr_drop=50").gates
    missing = [check.criterion for check in found.checks if check.status == "not_measured"]
    assert (found.verdict, missing) == (("undecided", ["speed"]) if name == "gate_a" else ("ship", []))
    assert found.title == f"gate {name[-1].upper()}"
    assert record(*words, f"experiment={name}", "gates.max_psnr_drop=-50").gates.verdict == "do not ship"


def test_a_run_that_names_no_gate_is_judged_by_the_default_one(record, game, overrides):
    found = record(*overrides(game, **{"data.limit": 3}), "kv=mx_v_only")
    assert found.gates.title == "default gate"
    assert found.gates.left_out == ["speed"]
    assert found.gates.verdict == "ship"  # of a cache that tiny rollouts hardly read
    assert record(*overrides(game)).gates is None  # BF16 alone: nothing to judge
    assert record(*overrides(game), "kv=mx_v_only", "gates=none").gates is None


def test_gates_b_and_c_stand_on_the_record_before(record, game, overrides, tmp_path, composed):
    words = overrides(game)
    with pytest.raises(ValueError, match="give gates.baseline"):
        run(composed(*words, "experiment=gate_b"))
    before = "bf16"
    record(*words, "experiment=gate_a")
    for name in ("b", "c"):
        kept = tmp_path / f"before_{name}.json"
        shutil.copy(tmp_path / "run" / "record.json", kept)
        found = record(*words, f"experiment=gate_{name}", f"gates.baseline={kept}", "gates.without=[speed]")
        checks = {check.criterion: check for check in found.gates.checks}
        assert checks["psnr"].interval is not None
        assert ("memory" in checks) is (name == "c")
        assert found.gates.against != before
        before = found.gates.against
    with pytest.raises(ValueError, match=r"data.future_frames: 4 in the baseline, 3 here"):
        run(composed(*words, "experiment=gate_b", f"gates.baseline={kept}", "data.future_frames=3"))
    with pytest.raises(ValueError, match="is the baseline; use gates=none"):
        run(composed(*words, "gates=a"))


@pytest.mark.parametrize(
    ("kind", "frame", "ends"),
    [("structure", 23, False), ("frozen", 10, False), ("structure", 9, True), ("non_finite", 23, True)],
)
@pytest.mark.parametrize("policy", ["raise", "fallback"])
def test_what_comes_after_bf16_itself_was_lost_ends_no_run(composed, monkeypatch, kind, frame, ends, policy):
    plan = plan_run(composed("model=smoke", "quant=mxfp8_all", f"on_instability={policy}"))
    guard = Guard(plan)
    bf16, theirs = Incident("structure", "bf16", "a", 10, "lost"), Incident(kind, "candidate", "a", frame, "lost too")
    guard.incidents.append(bf16)
    monkeypatch.setattr(guard, "_non_finite", lambda *_: [theirs] if kind == "non_finite" else [])
    monkeypatch.setattr(guard, "_visible", lambda *_: [theirs])
    clip = {0} if kind == "non_finite" else set()  # of which no picture is looked at
    rolled = {
        "candidate": SimpleNamespace(non_finite=clip),
        "bf16": SimpleNamespace(signs=lambda clip: None),
    }
    settle = functools.partial(guard.settle, None, rolled, None, 1, None, None)
    if not ends:
        assert settle() is None
        assert guard.incidents == [bf16, theirs]
    elif policy == "fallback":
        assert settle() is not None
    else:
        with pytest.raises(InstabilityError, match="lost too"):
            settle()
