"""BF16's frames, kept from run to run: candidates of one model, clips and settings are all held against the same ones.

On one CPU the same weights, clips, noise, settings, threads and code give the same frames, bit for bit. So what a run
has rolled out the next one need not roll out again, only look up. Times are not kept: a time says something only beside
those of the other arm, on the machine as it was at that moment.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from harness.ab.arm import Arm, Rolled
from harness.config import RunPlan
from harness.data.datamodule import ClipBatch
from harness.files.digest import Digest
from harness.files.kept import StaleError, Store
from harness.measure.environment import what_computes
from harness.measure.pictures import Pictures
from harness.report.codec import decode, read
from harness.report.sections import FramesFrom, FrameTimes
from harness.rollout import LatentDecoder

log = logging.getLogger(__name__)

LIMIT = 1 << 30
"""Bytes of frames that are kept; the demo's twelve clips of 48 frames take 57 MB."""
CHECKED = 2
"""Frames of a run's first batch that are rolled out all the same, to see that this machine still gives those bits."""


class KeptFrames:
    """Rolls the BF16 arm out, or finds what an earlier run has rolled out.

    Args:
        plan: of the run, on a CPU.
        arm: the BF16 arm.
        decode: the decoder.
        run: name of this run, for those that will find its frames.

    Found by a SHA-256 of everything that decides a frame: both models' weights, the batch and its noise, sampler,
    attention, compilation, torch and the processor, threads, this package's code.
    """

    def __init__(self, plan: RunPlan, arm: Arm, decode: LatentDecoder, run: str) -> None:
        conf = plan.conf
        self.arm, self.run, self.decode = arm, run, decode
        self.store = Store(Path(conf.measure.kept) / "bf16", LIMIT)
        self._like = decode.dtype, tuple(plan.dcae.sample_size)
        self._seen: bool | None = None
        self._digest = (
            Digest()
            .tensors(arm.core.state_dict())
            .tensors({f"decoder.{name}": tensor for name, tensor in decode.weights().items()})
            .settings(
                model=asdict(plan.arch),
                decoder=asdict(plan.dcae),
                scale=plan.vae_scale,
                dtype=str(decode.dtype),
                groups=decode.groups,
                setup=asdict(plan.setup),
                machine=what_computes(),
            )
            .code()
        )

    def roll(
        self,
        batch: ClipBatch,
        noise: tuple[Tensor, Tensor],
        on_frame: Callable[[], None],
        patient: bool,
        folder: Path,
    ) -> Rolled:
        """What :meth:`Arm.roll` gives; where the frames were found, ``Rolled.kept`` says so and there are no times."""
        key = self._key(batch, noise)
        found = self._find(key, batch, noise)
        if found is not None and self._still_so(found, batch, noise, folder):
            for _ in range(noise[1].shape[1]):
                on_frame()
            return found
        rolled = self.arm.roll(batch, noise, on_frame, patient, folder)
        if not rolled.non_finite:
            facts = FramesFrom(self.run, datetime.now(UTC).isoformat(timespec="seconds"))
            self.store.keep(key, {"rgb": rolled.pictures.rgb()}, json.dumps(asdict(facts)))
        return rolled

    def _key(self, batch: ClipBatch, noise: tuple[Tensor, Tensor]) -> str:
        given = {"context": batch.latents_context, "mouse": batch.mouse, "btn": batch.btn}
        return self._digest.copy().tensors(given | {"noise": noise[0], "new": noise[1]}).hex()

    def _find(self, key: str, batch: ClipBatch, noise: tuple[Tensor, Tensor]) -> Rolled | None:
        dtype, size = self._like
        shape = len(batch.clip_ids), noise[1].shape[1], 3, *size
        try:
            found = self.store.find(key, {"rgb": (shape, dtype)})
            if found is None:
                return None
            kept = read(FramesFrom, decode(found[1]))
        except (StaleError, ValueError) as error:
            log.warning("BF16 is rolled out again, kept frames are refused: %s", error)
            return None
        return Rolled(Pictures.of(found[0]["rgb"]), FrameTimes([], []), {}, kept=kept)

    def _still_so(self, found: Rolled, batch: ClipBatch, noise: tuple[Tensor, Tensor], folder: Path) -> bool:
        """Whether the first frames come out as they were kept: looked at once a run, in its first batch found."""
        if self._seen is None:
            arm = self.arm
            now = arm.roll(batch, (noise[0], noise[1][:, :CHECKED]), lambda: None, folder=folder)
            arm.take()
            self._seen = torch.equal(now.pictures.rgb(), found.pictures.rgb()[:, :CHECKED])
            if not self._seen:
                log.warning("BF16 is rolled out again: this machine does not give the kept frames' bits any more")
        return self._seen
