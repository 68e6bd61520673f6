"""The sampler: prefill, few-step rollout, compilation and CUDA graphs."""

from harness.rollout.assembly import Assembled, LatentDecoder, RolloutSetup, assemble, load_core, load_dcae
from harness.rollout.attention import FRAME_ATTENTION, AttentionKind
from harness.rollout.compile import CompileConf, CompileCounters
from harness.rollout.decoder import DecoderGroups, FrameDecoder
from harness.rollout.overlap import OverlappedDecoding
from harness.rollout.sampler import Frame, Rollout, SamplerConf, Warmup, make_cache

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
    "Rollout",
    "RolloutSetup",
    "SamplerConf",
    "Warmup",
    "assemble",
    "load_core",
    "load_dcae",
    "make_cache",
]
