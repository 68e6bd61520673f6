"""The sampler: prefill, few-step rollout, compilation and CUDA graphs."""

from typing import TYPE_CHECKING

from harness.lazily import attributes

if TYPE_CHECKING:
    from harness.rollout.assembly import (
        Assembled,
        LatentDecoder,
        Prepared,
        RolloutSetup,
        assemble,
        load_core,
        load_dcae,
        prepare,
    )
    from harness.rollout.attention import FRAME_ATTENTION
    from harness.rollout.compile import CompileCounters
    from harness.rollout.conf import AttentionKind, CompileConf, DecoderGroups, SamplerConf
    from harness.rollout.decoder import FrameDecoder
    from harness.rollout.overlap import OverlappedDecoding
    from harness.rollout.sampler import Frame, Rollout, Warmup, make_cache
else:
    __getattr__ = attributes(
        __name__,
        {
            "assembly": "Assembled LatentDecoder Prepared RolloutSetup assemble load_core load_dcae prepare",
            "attention": "FRAME_ATTENTION",
            "compile": "CompileCounters",
            "conf": "AttentionKind CompileConf DecoderGroups SamplerConf",
            "decoder": "FrameDecoder",
            "overlap": "OverlappedDecoding",
            "sampler": "Frame Rollout Warmup make_cache",
        },
    )

__all__ = [
    "FRAME_ATTENTION",
    "Assembled",
    "AttentionKind",
    "CompileConf",
    "CompileCounters",
    "DecoderGroups",
    "Frame",
    "FrameDecoder",
    "LatentDecoder",
    "OverlappedDecoding",
    "Prepared",
    "Rollout",
    "RolloutSetup",
    "SamplerConf",
    "Warmup",
    "assemble",
    "load_core",
    "load_dcae",
    "make_cache",
    "prepare",
]
