import sqlite3

import pytest
import torch
from game_clips import write_game_clip
from safetensors.torch import load_file

from harness.ab.module import pad_batch
from harness.data.datamodule import ClipBatch
from harness.measure.stability import InstabilityError
from harness.report.record import load_record
from harness.report.sections import Overlapped
from harness.run import run

SMOKE = ("model=smoke", "model.arch.n_layers=2", "data.future_frames=3", "data.limit=1", "measure.videos=false")


def test_recorded_clips_are_scored_against_the_recording(record, game, overrides, tmp_path):
    found = record(*overrides(game), "quant=mxfp4_mlp", "kv=mx_v_only")
    assert found.status == "complete"
    assert [clip.tag for clip in found.clips] == ["motion", "stand_still"]
    section = found.quality.all
    assert 3 < section.bf16.psnr < 30
    assert len(section.bf16.curve.psnr) == 4
    dropped = section.bf16.psnr - section.candidate.psnr
    assert section.drop.psnr == pytest.approx(dropped)
    assert 20 < section.fidelity.psnr < 100
    assert set(found.quality.by_tag) == {"motion", "stand_still"}
    looks = section.appearance
    assert looks["bf16"].sharpness > 0
    assert looks["drop"].sharpness == pytest.approx(looks["bf16"].sharpness - looks["candidate"].sharpness)
    assert looks["drop"].texture == pytest.approx(looks["candidate"].texture - looks["bf16"].texture)
    candidate = found.arms["candidate"]
    assert candidate.label == "mxfp4_mlp + mx_v_only"
    assert "E2M1" in candidate.numeric_path.linears
    assert candidate.numeric_path.kv == "K bf16, V e4m3"
    assert not candidate.speed_is_meaningful
    assert candidate.transform.count > 0
    assert candidate.memory.weight_bytes < found.arms["bf16"].memory.weight_bytes
    assert candidate.memory.kv_window_bytes < found.arms["bf16"].memory.kv_window_bytes
    sampled = candidate.kv_stats
    assert (len(sampled.frames), sampled.nonfinite) == (4, [])
    assert {entry.format for entry in sampled.layers} == {"e4m3"}
    assert found.arms["bf16"].kv_stats.layers == []
    assert found.model.weights == "checkpoint"
    assert not any("Random weights" in note for note in found.notes)
    rows = (tmp_path / "run" / "frames.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 2 * 4


def test_the_same_seed_gives_the_same_figures_and_another_seed_others(record):
    words = (*SMOKE, "quant=mxfp4_mlp", "measure.parts_frames=0")
    first, again, other = record(*words), record(*words), record(*words, "seed=1")
    psnr = [found.quality.all.fidelity.psnr for found in (first, again, other)]
    assert psnr[0] == pytest.approx(psnr[1], abs=0.01)
    assert psnr[0] != psnr[2]


def test_frames_do_not_depend_on_the_batch(record, game, overrides):
    """Three clips in batches of two: the last batch is padded, and every clip keeps its own noise."""
    words = (*overrides(game, **{"data.limit": 3}), "quant=mxfp4_mlp")
    alone, batched = record(*words), record(*words, "data.batch_size=2")
    assert [clip.clip_id for clip in batched.clips] == [clip.clip_id for clip in alone.clips]
    for one, two in zip(alone.clips, batched.clips, strict=True):
        assert two.scores["bf16"].psnr == pytest.approx(one.scores["bf16"].psnr, abs=0.05)


def test_a_baseline_runs_one_arm_and_says_so(record, tmp_path):
    found = record(*SMOKE)
    assert list(found.arms) == ["bf16"]
    assert found.quality is None
    assert "The candidate is the baseline" in (tmp_path / "run" / "table.txt").read_text()
    assert any("Random weights: speed is real, quality is not" in note for note in found.notes)


def test_a_quantised_cache_alone_is_a_candidate(record):
    found = record(*SMOKE, "kv=mx_kv")
    assert found.candidate.label == "mx_kv"
    assert found.candidate.transform is None
    assert found.candidate.speed_is_meaningful
    assert found.candidate.numeric_path.kv == "K e5m2, V e4m3"
    assert found.quality.all.fidelity.psnr < 100


def test_times_are_complete_and_parts_add_up_to_a_frame(record):
    found = record(*SMOKE, "quant=mxfp8_all", "measure.parts_frames=2")
    for arm in found.arms.values():
        speed = arm.speed
        assert speed.total_ms.n == 2  # three frames, the first of a clip not timed
        assert speed.total_ms.mean == pytest.approx(speed.dit_ms.mean + speed.decoder_ms.mean)
        assert speed.pipeline_fps == pytest.approx(1000 / speed.dit_ms.median)
        assert arm.parts.frames == 2
        assert all(arm.parts.ms[part].median > 0 for part in ("attention", "mlp", "modulation", "kv_get"))
        assert arm.compile.cold_start_s > 0
        assert arm.compile.recompiles_after_warmup == 0
    assert found.environment.packages["torch"]
    assert found.overrides[0] == "model=smoke"
    assert found.choices["quant"] == "mxfp8_all"
    assert found.config["quant"]["bits"] == 8


def test_nan_names_arm_clip_and_frame_and_keeps_finished_clips(composed, game, overrides, tmp_path, monkeypatch):
    from harness.rollout import Rollout

    plain, frames = Rollout.next_frame, []

    def poisoned(self, *args):
        frames.append(None)
        latent = plain(self, *args)
        return latent.fill_(torch.nan) if len(frames) == 11 else latent

    monkeypatch.setattr(Rollout, "next_frame", poisoned)
    with pytest.raises(InstabilityError, match=r"arm candidate: clip clip_3 has NaN or Inf in generated frame 2"):
        run(composed(*overrides(game), "quant=mxfp8_mlp"))
    found = load_record(tmp_path / "run" / "record.json")
    assert found.status == "failed"
    assert [clip.clip_id for clip in found.clips] == ["clip_0"]
    assert found.incidents[0].kind == "non_finite"


def test_padding_repeats_the_last_clip():
    batch = ClipBatch(
        clip_ids=["a", "b"],
        tags=["motion", "motion"],
        fps=[10.0, 10.0],
        latents_context=torch.arange(2.0).view(2, 1, 1, 1, 1),
        mouse=torch.zeros(2, 3, 2),
        btn=torch.zeros(2, 3, 11),
        frames=None,
        latents_future=None,
    )
    padded = pad_batch(batch, 4)
    assert padded.clip_ids == ["a", "b", "b", "b"]
    assert padded.latents_context.flatten().tolist() == [0, 1, 1, 1]
    assert padded.frames is None
    assert pad_batch(batch, 2) is batch


def test_a_latent_cache_is_compared_with_its_own_decoded_latents(record, tmp_path):
    torch.manual_seed(0)
    cache = {"vid": torch.randn(9, 16, 4, 4), "mouse": torch.randn(9, 2), "button": torch.ones(9, 11)}
    torch.save(cache, tmp_path / "0001_rgblatent.pt")
    found = record(*SMOKE, "data=owl_cache", f"data.paths=[{tmp_path}]", "kv=mx_v_only")
    assert found.data.reference == "decoded latents"
    assert found.quality.all.bf16.psnr > 0


@pytest.mark.parametrize("logger", ["csv", "tensorboard", "mlflow", "wandb"])
def test_loggers_get_a_line_per_clip(record, tmp_path, monkeypatch, logger):
    if logger != "csv":
        pytest.importorskip(logger)
    monkeypatch.chdir(tmp_path)
    record(*SMOKE, "kv=mx_v_only", f"logger={logger}")
    if logger == "mlflow":
        with sqlite3.connect(tmp_path / "mlflow.db") as database:
            assert database.execute("select key, step from metrics where key = 'fidelity/psnr'").fetchall() == [
                ("fidelity/psnr", 0)
            ]
        return
    where = {"wandb": tmp_path / "run" / "wandb"}.get(logger, tmp_path / "run" / "log")
    assert any(file.is_file() and file.stat().st_size > 50 for file in where.rglob("*"))


def test_a_video_per_clip_is_written(record, tmp_path):
    found = record(*SMOKE, "kv=mx_v_only", "measure.videos=true")
    assert found.clips[0].video == "videos/synthetic_0000.mp4"
    assert (tmp_path / "run" / "videos" / "synthetic_0000.mp4").stat().st_size > 500


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model.window": 8}, "has 10 frames, but start 0 + window 8 + 4 future frames need 12"),
        ({"data.paths": "[/no/such/folder]"}, "/no/such/folder"),
        ({"+model.arch.n_layers": 3}, "the checkpoint does not fit the GameRFT model"),
    ],
)
def test_what_does_not_fit_is_named(composed, game, overrides, change, said):
    with pytest.raises(ValueError, match=said.replace("+", r"\+")):
        run(composed(*overrides(game, **change)))


def test_a_short_clip_is_named_before_the_model_is_loaded(composed, game, overrides, tmp_path, monkeypatch):
    write_game_clip(tmp_path / "clips", "short_one", "motion", frames=5)
    monkeypatch.setattr("harness.ab.job.RolloutModule", lambda plan: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match="short_one.json: has 5 frames"):
        run(composed(*overrides(game, **{"data.paths": f"[{tmp_path / 'clips'}]"})))


def test_overlapped_decoding_is_refused_on_a_cpu(composed):
    with pytest.raises(ValueError, match="overlap_decode=true on cpu: it needs CUDA streams; use overlap_decode=false"):
        run(composed(*SMOKE, "compile.overlap_decode=true"))


@pytest.mark.parametrize("same", [True, False])
def test_throughput_with_overlapped_decoding_stands_beside_the_latency(record, monkeypatch, tmp_path, same):
    """A CPU has no streams: something that decodes frame after frame stands in for what overlaps."""

    class Sequential:
        def __init__(self, rollout, decode):
            self.rollout, self.decode = rollout, decode

        def play(self, inputs):
            return [self.decode(self.rollout.next_frame(*frame)).clone() + (not same) for frame in inputs], 0.5

    monkeypatch.setattr("harness.ab.arm.OverlappedDecoding", Sequential)
    monkeypatch.setattr("harness.config.plan.compile_room.validate", lambda conf, device: None)
    monkeypatch.setattr("harness.rollout.sampler.validate_compile", lambda conf, device: None)
    found = record(*SMOKE, "kv=mx_v_only", "compile.overlap_decode=true", "data.batch_size=2", "data.limit=2")
    for arm in found.arms.values():
        assert arm.speed.overlapped == Overlapped(fps=3 * 2 / 0.5, frames=3, same_pixels=same)
        assert arm.speed.total_fps > 0
    table = (tmp_path / "run" / "table.txt").read_text()
    assert "FPS, decoding overlapped" in table
    assert ("gave other pixels" in table) != same
    assert record(*SMOKE).arms["bf16"].speed.overlapped is None


def test_the_record_says_in_which_groups_the_decoder_runs(record):
    grouped, dense = (record(*SMOKE, f"decoder.groups={how}").model.decoder_groups for how in ("grouped", "dense"))
    assert grouped.keys() == dense.keys()
    assert min(grouped.values()) > 1
    assert set(dense.values()) == {1}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_overlapped_decoding_gives_the_same_pixels_in_a_run(record):
    words = (*SMOKE, "trainer=gpu", "compile=on", "compile.overlap_decode=true", "kv=mx_v_only")
    for arm in record(*words, "data.future_frames=12").arms.values():
        assert arm.speed.overlapped.same_pixels
        assert arm.speed.overlapped.fps > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_a_compiled_gpu_run_measures_time_and_memory_on_the_device(record):
    found = record(*SMOKE, "trainer=gpu", "compile=on", "quant=mxfp8_all", "kv=mx_v_only", "data.future_frames=6")
    assert found.environment.gpu.name
    for arm in found.arms.values():
        assert arm.compile.cuda_graph
        assert arm.compile.recompiles_after_warmup == 0
        assert 0 < arm.memory.transient < arm.memory.peak_allocated <= arm.memory.peak_reserved
        assert 0 < arm.speed.dit_ms.median < arm.speed.total_ms.median
    assert found.quality.all.fidelity.psnr > 20


def test_which_of_several_sets_of_weights_ran_is_said(game, record, overrides, tmp_path):
    state = load_file(game["model.checkpoint"])
    several = {"model": {key: value + 1 for key, value in state.items()}, "model_ema": state}
    torch.save(several, tmp_path / "both.pt")
    words = overrides(game, **{"model.checkpoint": tmp_path / "both.pt", "data.limit": 1})
    averaged, online = record(*words), record(*words, "model.weights=model")
    plain = record(*overrides(game, **{"data.limit": 1}))
    assert averaged.clips[0].scores == plain.clips[0].scores != online.clips[0].scores
    assert any("weights of 'model_ema', not of 'model'" in note for note in averaged.notes)
    assert any("weights of 'model', not of 'model_ema'" in note for note in online.notes)


def test_ones_own_clips_are_a_group_of_their_own(game, record, overrides):
    found = record("data=clips", *overrides(game, **{"data.limit": 1}))
    assert (found.data.source, found.choices["data"], len(found.clips)) == ("clips", "clips", 1)
