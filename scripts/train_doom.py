#!/usr/bin/env python3
"""Train the Doom demo model: record play, fit the autoencoder, then the world model in phases.

    python scripts/train_doom.py --work outputs/doom record autoencoder decoder flow forced rollout sharpen \\
        unroll deepen polish settle roam blend evaluate export

Stages run in the order given and leave their result in ``--work``; a later call goes on from what is there, so that
training can be cut up at will. Each training stage runs for its number of minutes (see ``--help``).

* ``record``: play of VizDoom's Freedom scenarios as arrays (needs the ``doom`` extra).
* ``autoencoder``: DCAE for 128×128 frames, 8×8 latents.
* ``decoder``: the decoder on, beside a discriminator, for texture.
* ``flow``: GameRFT by rectified flow with an independent time per frame.
* ``forced``: the two-step sampler's passes, after recorded frames (see ``doom_world/world_model.py``).
* ``rollout``: the same on the sampler's own states.
* ``sharpen``: the same beside a discriminator of decoded pictures, for detail.
* ``unroll``: the two steps after contexts that are imagined throughout.
* ``deepen``: more blocks in the autoencoder, fitted on; its latents stay near the old ones.
* ``polish``: ``decoder`` again, for the deeper one.
* ``settle``: ``unroll`` on the new latents.
* ``roam``: long rollouts beside a discriminator that compares them with recorded play at any time.
* ``blend``: the mean of the weights of ``settle``, which predicts best, and ``roam``, which keeps detail.
* ``evaluate``: PSNR over held-out play against "repeat the last frame" and shuffled actions, sharpness, lost structure;
  a contact sheet.
* ``export``: BF16 safetensors and YAML, as ``assets/doom`` ships them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    from harness.start import require

    require()

import torch
import yaml
from doom_world.autoencoder import (
    AutoencoderTask,
    DecoderTask,
    DeepenTask,
    TimedModule,
    densify,
    encode_all,
    reconstruction_psnr,
)
from doom_world.bank import Controls, SequenceBank, load_shards, ticks
from doom_world.evaluate import FREE_PLAY, contact_sheet, evaluate, held_out_play
from doom_world.world_model import (
    FlowTask,
    ForcedTask,
    RoamTask,
    RolloutTask,
    SharpenTask,
    UnrollTask,
    WorldModelTask,
)
from lightning import Trainer
from record_doom import record_many
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from harness.files.writing import folder_problem
from harness.models.bf16 import has_fast_bf16
from harness.models.checkpoint import load_decoder, load_encoder, load_gamerft, random_gamerft
from harness.models.dcae import DCAEConfig
from harness.models.gamerft import GameRFTConfig, GameRFTCore
from harness.rollout.sampler import SamplerConf

DCAE = DCAEConfig(
    sample_size=[128, 128],
    latent_size=8,
    latent_channels=32,
    ch_0=32,
    ch_max=256,
    encoder_blocks_per_stage=[2, 2, 2, 2],
    decoder_blocks_per_stage=[2, 2, 2, 2],
)
DEEPER: dict[str, Any] = {"encoder_blocks_per_stage": [4, 4, 3, 2], "decoder_blocks_per_stage": [6, 6, 4, 2]}
"""Of the autoencoder from ``deepen`` on."""
GAMERFT = GameRFTConfig(
    n_layers=12,
    n_heads=6,
    d_model=192,
    channels=32,
    sample_size=8,
    tokens_per_frame=64,
    n_frames=1024,
    local_window=8,
    rope_impl="motion",
    rope_ats_delta=2.0,
)
SAMPLER = SamplerConf(window=24, timesteps=[1.0, 0.25], context_noise=0.25)


STAGES = [
    *("record", "autoencoder", "decoder", "flow", "forced", "rollout", "sharpen"),
    *("unroll", "deepen", "polish", "settle", "roam", "blend", "evaluate", "export"),
]
"""In the order in which they follow each other."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=STAGES)
    parser.add_argument("--work", type=Path, required=True, help="folder of recordings and checkpoints")
    parser.add_argument("--out", type=Path, default=Path("assets/doom"), help="where export writes")
    parser.add_argument("--frames", type=int, default=650_000, help="frames to record")
    parser.add_argument("--workers", type=int, default=16, help="recording processes")
    parser.add_argument("--autoencoder-minutes", type=float, default=2.0)
    parser.add_argument("--decoder-minutes", type=float, default=3.0)
    parser.add_argument("--flow-minutes", type=float, default=3.0)
    parser.add_argument("--forced-minutes", type=float, default=4.0)
    parser.add_argument("--rollout-minutes", type=float, default=2.0)
    parser.add_argument("--sharpen-minutes", type=float, default=2.0)
    parser.add_argument("--unroll-minutes", type=float, default=4.0)
    parser.add_argument("--deepen-minutes", type=float, default=4.0)
    parser.add_argument("--polish-minutes", type=float, default=2.5)
    parser.add_argument("--settle-minutes", type=float, default=2.3)
    parser.add_argument("--roam-minutes", type=float, default=4.4)
    parser.add_argument("--horizon", type=int, default=5, help="generated frames per training rollout; many blur")
    parser.add_argument("--rounds", type=int, default=3, help="times a context is imagined over, at most")
    parser.add_argument("--roam-horizon", type=int, default=40, help="generated frames per rollout in roam")
    weight = "of the adversarial gradient beside the regression's, in"
    parser.add_argument("--decoder-weight", type=float, default=1.0, help=f"{weight} decoder")
    parser.add_argument("--sharpen-weight", type=float, default=0.5, help=f"{weight} sharpen")
    parser.add_argument("--polish-weight", type=float, default=0.5, help=f"{weight} polish")
    parser.add_argument("--roam-weight", type=float, default=0.5, help=f"{weight} roam")
    parser.add_argument("--batch", type=int, default=32, help="sequences per step; autoencoder: frames, 8 times that")
    shares = "unroll, settle 0.6, rollout 0.3, sharpen, roam 0.15 of it"
    rate = f"peak rate of AdamW in flow and forced (Muon: twice that; {shares})"
    parser.add_argument("--lr", type=float, default=2e-3, help=rate)
    parser.add_argument("--eval-clips", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


class Workshop:
    """The state of a training: recordings, latents and weights, each loaded once and when first needed."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.work: Path = args.work
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.phase = "latest"
        """The phase of the world model that ran last."""
        self._frames: tuple[Tensor, Controls] | None = None
        self._latents: Tensor | None = None

    def frames(self) -> tuple[Tensor, Controls]:
        """Recorded frames and controls."""
        if self._frames is None:
            self._frames = load_shards(self.work / "recorded", self.device)
            print(f"{len(self._frames[0])} frames on {self.device}", flush=True)
        return self._frames

    def autoencoder(self) -> dict[str, Any]:
        """What is known of the autoencoder so far: ``vae_scale``, ``train_psnr`` and whether it is ``deeper``."""
        return dict(json.loads((self.work / "autoencoder.json").read_text()))

    def vae_scale(self) -> float:
        """Standard deviation of the latents: the model sees latents divided by it."""
        return float(self.autoencoder()["vae_scale"])

    def dcae(self) -> DCAEConfig:
        """The autoencoder's shape so far."""
        return dataclasses.replace(DCAE, **DEEPER) if self.autoencoder().get("deeper") else DCAE

    def encoder(self) -> nn.Module:
        """The encoder so far."""
        return densify(load_encoder(self.work / "encoder.safetensors", self.dcae()).to(self.device))

    def decoder(self) -> nn.Module:
        """The decoder so far."""
        return densify(load_decoder(self.work / "decoder.safetensors", self.dcae()).to(self.device))

    def decode(self) -> Callable[[Tensor], Tensor]:
        """The decoder so far as a map from latents in the model's scale to pictures ``[B, 3, h, w]`` in [-1, 1]."""
        decoder, scale = self.decoder(), self.vae_scale()
        return lambda latents: decoder((latents * scale).contiguous(memory_format=torch.channels_last))

    def latents(self) -> Tensor:
        """Every recorded frame's latent, in the model's scale, BF16 ``[T, C, S, S]``."""
        if self._latents is None:
            self._latents = encode_all(self.encoder(), self.frames()[0]) / self.vae_scale()
        return self._latents

    def forget_latents(self) -> None:
        """The encoder has changed: encode anew when latents are next asked for."""
        self._latents = None

    def core(self) -> GameRFTCore:
        """The world model so far: the last phase's weights, or fresh ones."""
        path = self.work / "dit.safetensors"
        return load_gamerft(path, GAMERFT) if path.is_file() else random_gamerft(GAMERFT, self.args.seed)

    def fit(self, task: TimedModule) -> None:
        """Run Lightning's fit loop until the task's time is up."""
        torch.manual_seed(self.args.seed)
        torch._dynamo.reset()  # what earlier stages compiled would count against the limit of variants
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
        trainer = Trainer(
            accelerator="gpu" if self.device.type == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed" if has_fast_bf16(self.device) else "32-true",
            max_epochs=1,
            gradient_clip_val=1.0 if task.automatic_optimization else None,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        begin = time.monotonic()
        trainer.fit(task, ticks())
        task.to(self.device)
        print(f"{type(task).__name__}: {task.steps} steps in {time.monotonic() - begin:.0f} s", flush=True)


def save(module: nn.Module, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a module's state dict as safetensors, atomically."""
    state = {key: value.detach().to(dtype).contiguous().cpu() for key, value in module.state_dict().items()}
    partial = path.with_suffix(".partial")
    save_file(state, partial)
    partial.replace(path)


def stage_record(shop: Workshop) -> None:
    begin = time.monotonic()
    index = record_many(shop.args.frames, shop.args.workers, shop.args.seed, shop.work / "recorded")
    total = sum(shard["frames"] for shard in index)
    print(f"recorded {total} frames in {time.monotonic() - begin:.0f} s", flush=True)


def stage_autoencoder(shop: Workshop) -> None:
    frames, _ = shop.frames()
    task = AutoencoderTask(DCAE, frames, 60 * shop.args.autoencoder_minutes, batch=8 * shop.args.batch)
    finish_autoencoder(shop, task)


def halves(shop: Workshop) -> dict[str, Any]:
    """Both halves' state dicts as the last autoencoder stage saved them."""
    return {name: load_file(shop.work / f"{name}.safetensors") for name in ("encoder", "decoder")}


def stage_decoder(shop: Workshop, name: str = "decoder") -> None:
    seconds, weight = (60 * getattr(shop.args, f"{name}_minutes"), getattr(shop.args, f"{name}_weight"))
    frames, batch = shop.frames()[0], 4 * shop.args.batch
    task = DecoderTask(shop.dcae(), frames, seconds, batch, 5e-4, weight=weight, **halves(shop))
    finish_autoencoder(shop, task)


def stage_polish(shop: Workshop) -> None:
    stage_decoder(shop, "polish")


def stage_deepen(shop: Workshop) -> None:
    deeper = dataclasses.replace(DCAE, **DEEPER)
    seconds, batch = 60 * shop.args.deepen_minutes, 4 * shop.args.batch
    task = DeepenTask(deeper, shop.frames()[0], seconds, batch, 1e-3, anchor=shop.encoder(), **halves(shop))
    finish_autoencoder(shop, task, deeper=True)


def finish_autoencoder(shop: Workshop, task: AutoencoderTask, deeper: bool = False) -> None:
    frames, _ = shop.frames()
    shop.fit(task)
    average = dict(task.ema.module.named_children())
    encoder, decoder = average["encoder"], average["decoder"]
    save(encoder, shop.work / "encoder.safetensors")
    save(decoder, shop.work / "decoder.safetensors")
    some = torch.randint(len(frames), (512,), device=frames.device)
    scale = float(encode_all(encoder, frames[some]).float().std())
    psnr = reconstruction_psnr(encoder, decoder, frames[some])
    path = shop.work / "autoencoder.json"
    if not path.is_file() or task.automatic_optimization:  # the decoder's stages leave the latents as they are
        path.write_text(json.dumps({"vae_scale": round(scale, 4), "train_psnr": psnr, "deeper": deeper}))
        shop.forget_latents()
    print(f"{type(task).__name__}: latent std {scale:.3f}, reconstruction {psnr:.2f} dB", flush=True)


def stage_flow(shop: Workshop) -> None:
    bank = SequenceBank(shop.latents(), shop.frames()[1], length=SAMPLER.window + 8)
    task = FlowTask(shop.core(), bank, SAMPLER, 60 * shop.args.flow_minutes, shop.args.batch, shop.args.lr)
    finish_world_model(shop, task, "flow")


def stage_forced(shop: Workshop) -> None:
    fit_two_steps(shop, ForcedTask, "forced", shop.args.forced_minutes, shop.args.lr)


def stage_rollout(shop: Workshop) -> None:
    fit_two_steps(shop, RolloutTask, "rollout", shop.args.rollout_minutes, 0.3 * shop.args.lr)


def stage_sharpen(shop: Workshop) -> None:
    task = partial(SharpenTask, decode=shop.decode(), weight=shop.args.sharpen_weight)
    fit_two_steps(shop, task, "sharpen", shop.args.sharpen_minutes, 0.15 * shop.args.lr)


def stage_unroll(shop: Workshop, name: str = "unroll") -> None:
    task, minutes = partial(UnrollTask, rounds=shop.args.rounds), getattr(shop.args, f"{name}_minutes")
    fit_two_steps(shop, task, name, minutes, 0.6 * shop.args.lr, horizon=8)


def stage_settle(shop: Workshop) -> None:
    stage_unroll(shop, "settle")


def stage_roam(shop: Workshop) -> None:
    args = shop.args
    task = partial(RoamTask, decode=shop.decode(), weight=args.roam_weight, near=args.horizon)
    fit_two_steps(shop, task, "roam", args.roam_minutes, 0.15 * args.lr, horizon=args.roam_horizon)


def stage_blend(shop: Workshop) -> None:
    settled, roamed = (load_file(shop.work / f"dit_{name}.safetensors") for name in ("settle", "roam"))
    core = shop.core()
    core.load_state_dict({key: (value + roamed[key]) / 2 for key, value in settled.items()})
    shop.phase = "blend"
    for path in (shop.work / "dit_blend.safetensors", shop.work / "dit.safetensors"):
        save(core, path)


def fit_two_steps(
    shop: Workshop, cls: Callable[..., ForcedTask], name: str, minutes: float, lr: float, horizon: int | None = None
) -> None:
    length = SAMPLER.window + (shop.args.horizon if horizon is None else horizon)
    bank = SequenceBank(shop.latents(), shop.frames()[1], length=length)
    task = cls(shop.core(), bank, SAMPLER, 60 * minutes, shop.args.batch, lr)
    finish_world_model(shop, task, name)


def finish_world_model(shop: Workshop, task: WorldModelTask, name: str) -> None:
    """Fit, and keep the averaged weights twice: as the latest, and under the stage's own name."""
    shop.fit(task)
    shop.phase = name
    for path in (shop.work / f"dit_{name}.safetensors", shop.work / "dit.safetensors"):
        save(task.averaged(), path)


def stage_evaluate(shop: Workshop) -> None:
    encoder, decoder = shop.encoder(), shop.decoder()
    core = shop.core().to(shop.device, torch.bfloat16)
    cache = shop.work / "held_out.pt"
    if not cache.is_file():
        torch.save(held_out_play(shop.args.eval_clips, SAMPLER.window + FREE_PLAY, shop.args.workers), cache)
    play = torch.load(cache, weights_only=True)
    figures, pictures = evaluate(core, encoder, decoder, play, SAMPLER, shop.vae_scale(), shop.device)
    (shop.work / f"evaluation_{shop.phase}.json").write_text(json.dumps(figures, indent=1))
    contact_sheet(pictures, shop.work / f"evaluation_{shop.phase}.png")
    print(json.dumps(figures, indent=1), flush=True)


def stage_export(shop: Workshop) -> None:
    out: Path = shop.args.out
    out.mkdir(parents=True, exist_ok=True)
    for name in ("dit", "encoder", "decoder"):
        state = load_file(shop.work / f"{name}.safetensors")
        save_file({key: value.to(torch.bfloat16) for key, value in state.items()}, out / f"{name}.safetensors")
    train = {"vae_scale": shop.vae_scale()}
    for name, config in (("config", GAMERFT), ("dcae", shop.dcae())):
        content = {"model": dataclasses.asdict(config), "train": train}
        (out / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    print(f"exported to {out}", flush=True)


def main() -> None:
    args = parse_args()
    stage = ""
    try:
        if (problem := folder_problem(args.work)) is not None:
            raise ValueError(f"--work {problem}")
        args.work.mkdir(parents=True, exist_ok=True)
        shop = Workshop(args)
        for stage in args.stages:
            print(f"== {stage}", flush=True)
            globals()[f"stage_{stage}"](shop)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        needs = f"; each stage needs what those before it wrote: {', '.join(STAGES)}" if stage else ""
        print(f"error: {stage}{': ' if stage else ''}{error}{needs}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
