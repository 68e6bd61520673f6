import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning import LightningModule, Trainer
from torch import nn
from torch.utils.data import DistributedSampler

from harness.data.clips import Clip, ClipError, read_clip, write_clip
from harness.data.conf import DataConf, Source, Tag, validate
from harness.data.datamodule import ClipDataModule
from harness.data.sources import ClipShape

SHAPE = ClipShape(window=3, buttons=11, channels=3, side=2, frame_size=(16, 16), vae_scale=0.5)


class Blocks(nn.Module):
    """An encoder with a latent that can be computed by hand: the mean over blocks of 8×8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.unit = nn.Parameter(torch.ones(()))
        self.seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += len(x)
        return self.unit * nn.functional.avg_pool2d(x, 8)


def make_clip(folder: Path, clip_id: str, tag: str = "motion", frames: int = 8, **changes: object) -> Path:
    generator = torch.Generator().manual_seed(len(clip_id) + ord(clip_id[-1]))
    level = torch.randint(0, 255, (frames, 3, 1, 1), generator=generator, dtype=torch.uint8)
    clip = Clip(
        id=clip_id,
        frames=level.expand(-1, -1, 16, 16).clone(),
        buttons=torch.randint(0, 2, (frames, 11), generator=generator, dtype=torch.uint8),
        mouse=torch.randn(frames, 2, generator=generator),
        fps=17.5,
        tag=tag,
        scenario="drawn",
    )
    return write_clip(folder, replace(clip, **changes))


def make_cache(folder: Path, clip_id: str, frames: int = 8, channels: int = 3) -> torch.Tensor:
    vid = torch.randn(frames, channels, 2, 2)
    torch.save(
        {"vid": vid, "mouse": torch.ones(frames, 2), "button": torch.zeros(frames, 11)}, folder / f"{clip_id}.pt"
    )
    return vid


def module_of(folder: Path, **changes: object) -> ClipDataModule:
    conf = replace(DataConf(paths=[str(folder)], future_frames=4), **changes)
    return ClipDataModule(conf, SHAPE, Blocks())


def batches(module: ClipDataModule) -> list:
    module.setup("predict")
    return [module.encode(batch) for batch in module.predict_dataloader()]


def test_a_batch_holds_encoded_context_and_recorded_future(tmp_path):
    paths = [make_clip(tmp_path, name) for name in ("a", "b")]
    (batch,) = batches(module_of(tmp_path, batch_size=2, start=1))
    assert batch.clip_ids == ["a", "b"]
    assert batch.tags == ["motion", "motion"]
    assert batch.fps == [17.5, 17.5]
    assert batch.latents_future is None
    for index, path in enumerate(paths):
        clip = read_clip(path, first=1, count=7)
        assert torch.equal(batch.mouse[index], clip.mouse)
        assert torch.equal(batch.btn[index], clip.buttons.float())
        assert torch.equal(batch.frames[index], clip.frames[3:].float() / 255)
        by_hand = nn.functional.avg_pool2d(clip.frames[:3].float() / 127.5 - 1, 8) / 0.5
        torch.testing.assert_close(batch.latents_context[index], by_hand)
    assert batch.latents_context.shape == (2, 3, 3, 2, 2)
    assert not batch.latents_context.requires_grad


def test_only_the_context_is_encoded(tmp_path):
    make_clip(tmp_path, "a")
    module = module_of(tmp_path)
    batches(module)
    assert module.encoder.seen == SHAPE.window


def test_latent_caches_are_scaled_and_are_their_own_reference(tmp_path):
    vid = make_cache(tmp_path, "a")
    module = module_of(tmp_path, source=Source.owl_cache)
    (batch,) = batches(module)
    assert batch.frames is None
    assert torch.equal(batch.latents_context[0], vid[:3] / 0.5)
    assert torch.equal(batch.latents_future[0], vid[3:7] / 0.5)
    assert batch.fps == [60.0]
    assert module.describe()["reference"] == "decoded latents"


def test_synthetic_clips_have_no_reference_and_say_so():
    conf = DataConf(source=Source.synthetic, future_frames=20, batch_size=4, seed=5)
    module = ClipDataModule(conf, SHAPE)
    (batch,) = batches(module)
    assert batch.frames is None
    assert batch.latents_future is None
    assert sorted(batch.tags) == ["motion", "motion", "motion", "stand_still"]
    still = batch.tags.index("stand_still")
    assert not batch.mouse[still].any()
    assert not batch.btn[still].any()
    assert batch.mouse.shape == (4, 23, 2)
    assert set(batch.btn.unique().tolist()) == {0.0, 1.0}
    assert module.describe()["reference"] == "none"
    assert module.describe()["quality_is_meaningful"] is False


def test_synthetic_clips_depend_on_the_seed_and_their_id_alone():
    def latents(batch_size: int, seed: int) -> dict[str, torch.Tensor]:
        conf = DataConf(source=Source.synthetic, future_frames=4, batch_size=batch_size, seed=seed)
        return {
            i: z
            for b in batches(ClipDataModule(conf, SHAPE))
            for i, z in zip(b.clip_ids, b.latents_context, strict=True)
        }

    one, three, other = latents(1, 0), latents(3, 0), latents(1, 1)
    assert one.keys() == three.keys() == other.keys()
    assert all(torch.equal(one[key], three[key]) for key in one)
    assert not any(torch.equal(one[key], other[key]) for key in one)


def test_the_first_clips_hold_both_tags(tmp_path):
    for name in ("a", "b", "c"):
        make_clip(tmp_path, name)
    make_clip(tmp_path, "y", tag="stand_still")
    make_clip(tmp_path, "z", tag="stand_still")
    ids = [i for batch in batches(module_of(tmp_path)) for i in batch.clip_ids]
    assert ids == ["a", "y", "b", "z", "c"]
    assert [i for b in batches(module_of(tmp_path, limit=2)) for i in b.clip_ids] == ["a", "y"]
    assert [i for b in batches(module_of(tmp_path, tag=Tag.motion, limit=2)) for i in b.clip_ids] == ["a", "b"]


def test_a_trainer_gets_clip_batches(tmp_path):
    class Seen(LightningModule):
        def predict_step(self, batch, batch_idx):
            return batch.clip_ids, batch.latents_context.shape, batch.frames.shape

    for name in ("a", "b", "c"):
        make_clip(tmp_path, name)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    seen = trainer.predict(Seen(), datamodule=module_of(tmp_path, batch_size=2))
    assert seen == [
        (["a", "b"], (2, 3, 3, 2, 2), (2, 4, 3, 16, 16)),
        (["c"], (1, 3, 3, 2, 2), (1, 4, 3, 16, 16)),
    ]


def test_a_distributed_sampler_gives_every_clip_to_one_process(tmp_path):
    for name in ("a", "b", "c", "d"):
        make_clip(tmp_path, name)
    module = module_of(tmp_path)
    module.setup("predict")
    dataset = module.predict_dataloader().dataset
    shares = [[dataset[i].clip_id for i in DistributedSampler(dataset, 2, rank, shuffle=False)] for rank in (0, 1)]
    assert shares == [["a", "c"], ["b", "d"]]


def test_worker_processes_give_the_same_batches(tmp_path):
    make_clip(tmp_path, "a")
    (here,), (there,) = batches(module_of(tmp_path)), batches(module_of(tmp_path, num_workers=1))
    assert torch.equal(here.latents_context, there.latents_context)


def test_a_window_longer_than_the_clip_names_clip_frames_and_need(tmp_path):
    make_clip(tmp_path, "a", frames=8)
    message = r"a\.json: has 8 frames, but start 2 \+ window 3 \+ 4 future frames need 9; use a shorter window"
    with pytest.raises(ClipError, match=message):
        module_of(tmp_path, start=2).check()


def test_a_clip_of_another_size_than_the_model_is_refused_before_its_video_is_decoded(tmp_path):
    """8192×8192 pixels of one colour are a file of some kilobytes, and 100 of them 20 GB in memory."""
    sidecar = make_clip(tmp_path, "a").with_suffix(".json")
    said = sidecar.read_text()
    for name, wrong in (("height", "frames of shape [3, 8192, 16]"), ("button_names", "buttons of shape [12]")):
        content = json.loads(said)
        content[name] = 8192 if name == "height" else [*content[name], "more"]
        for action in content["actions"]:
            action["buttons"] += [0] * (name == "button_names")
        sidecar.write_text(json.dumps(content))
        (tmp_path / "a.mp4").write_bytes(b"never looked at")
        with pytest.raises(ClipError, match=re.escape(f"a.json: {wrong}; the model has")):
            module_of(tmp_path).check()


def test_every_bad_clip_is_named_before_anything_runs(tmp_path):
    for name in ("good", "short", "damaged", "large", "pad"):
        make_clip(tmp_path, name, frames=5 if name == "short" else 8)
    big = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    make_clip(tmp_path, "large", frames=8)
    clip = read_clip(tmp_path / "large.mp4")
    write_clip(tmp_path, replace(clip, frames=big))
    write_clip(
        tmp_path, replace(read_clip(tmp_path / "pad.mp4"), buttons=torch.zeros(8, 4), button_names=tuple("WASD"))
    )
    (tmp_path / "damaged.mp4").write_bytes(b"no video")
    with pytest.raises(ClipError) as error:
        module_of(tmp_path).check()
    lines = str(error.value).splitlines()
    expected = ("damaged.mp4: damaged", "large.json: frames of shape [3, 32, 32]; the model has [3, 16, 16]")
    expected += ("pad.json: buttons of shape [4]; the model has [11]", "short.json: has 5 frames")
    assert len(lines) == len(expected)
    for text in expected:
        assert sum(text in line for line in lines) == 1, text


def test_clips_of_two_sizes_are_an_error_where_the_decoder_does_not_say_which(tmp_path):
    make_clip(tmp_path, "a")
    make_clip(tmp_path, "b", frames=8)
    write_clip(tmp_path, replace(read_clip(tmp_path / "b.mp4"), frames=torch.zeros(8, 3, 32, 32, dtype=torch.uint8)))
    module = ClipDataModule(DataConf(paths=[str(tmp_path)], future_frames=4), replace(SHAPE, frame_size=None), Blocks())
    with pytest.raises(ClipError, match=r"different frame sizes: .*a\.json 16×16, .*b\.json 32×32"):
        module.check()


def test_the_frames_that_will_be_used_are_the_ones_checked(tmp_path):
    vid = make_cache(tmp_path, "a", frames=10)
    vid[8] = float("nan")
    torch.save({"vid": vid, "mouse": torch.ones(10, 2), "button": torch.zeros(10, 11)}, tmp_path / "a.pt")
    module_of(tmp_path, source=Source.owl_cache, start=1).check()
    with pytest.raises(ClipError, match=r"a\.pt: vid of frame 8 holds NaN"):
        module_of(tmp_path, source=Source.owl_cache, start=2).check()


def test_latents_of_another_model_are_named(tmp_path):
    make_cache(tmp_path, "a", channels=5)
    with pytest.raises(ClipError, match=r"a\.pt: latents of shape \[5, 2, 2\]; the model has \[3, 2, 2\]"):
        module_of(tmp_path, source=Source.owl_cache).check()


def test_a_tag_that_no_clip_has_is_an_error(tmp_path):
    make_clip(tmp_path, "a")
    with pytest.raises(ClipError, match="tag=stand_still: none of 1 clips has it"):
        module_of(tmp_path, tag=Tag.stand_still).check()


def test_an_encoder_of_another_shape_is_an_error(tmp_path):
    make_clip(tmp_path, "a")
    conf = DataConf(paths=[str(tmp_path)], future_frames=4)
    module = ClipDataModule(conf, SHAPE, lambda x: nn.functional.avg_pool2d(x, 4))
    with pytest.raises(ValueError, match=r"the encoder gives latents of \[3, 4, 4\]; the model has \[3, 2, 2\]"):
        batches(module)


def test_recorded_clips_without_an_encoder_are_an_error():
    with pytest.raises(ValueError, match="give an encoder"):
        ClipDataModule(DataConf(paths=["clips"]), SHAPE)


def test_every_wrong_field_is_listed_at_once():
    conf = DataConf(paths=[], batch_size=0, start=-1, future_frames=0, limit=0, fps=0)
    with pytest.raises(ValueError, match="data config") as error:
        validate(conf)
    for text in (
        "batch_size=0",
        "start=-1",
        "future_frames=0",
        "limit=0: must be at least 1, or null",
        "fps=0",
        "paths",
    ):
        assert text in str(error.value)
    with pytest.raises(ValueError, match="source=cassette: allowed are clips, owl_cache, synthetic"):
        validate(DataConf(source="cassette"))
    with pytest.raises(ValueError, match="with source=synthetic, which reads no files"):
        validate(DataConf(source=Source.synthetic, paths=["clips"]))
    validate(DataConf(source="clips", paths=["clips"], tag="motion"))
