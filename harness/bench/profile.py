"""Where one frame's time goes: kernels by part and the longest of them.

    python scripts/profile_frame.py model=dit_v4 attention=fused compile=on trainer=gpu
    python scripts/profile_frame.py --device cpu --frames 2 model=smoke
    python scripts/profile_frame.py --before outputs/profile/sdpa.json --out outputs/profile/fused.json model=dit_v4 ...

Takes the overrides that harness/run.py takes; the arm profiled is the candidate's formats (BF16 if none are chosen).
Weights are random (seeded). On a GPU the frames run as they are (captured graph included) and figures are device
times of kernels; on a CPU they are self times of operators. Writes JSON; with --before also says what changed.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from harness.bench import arguments
from harness.bench.inputs import build, compose_plan, random_inputs
from harness.config import RunPlan, register
from harness.files.text import read_json
from harness.measure.environment import environment
from harness.models.gamerft import GameRFTCore
from harness.rollout import assemble
from harness.streams import patient

PARTS = (
    ("attention", r"mx_attend|window_kernel|window_attention|flash|fmha|attention|flex|sdpa"),
    ("cache", r"index_copy|index_put|scatter"),
    ("norm and elementwise", r"triton_(red|poi|per)_|residual_norm"),
    ("conditioning", r"^(begin_frame|add_controls|plain_product)$"),
    ("ends of a step", r"^(embed|velocity)$"),
    ("packed GEMM", r"^mx_|^gemm_fp8|^gemm_bf16|harness_mx"),
    ("GEMM", r"gemm|cutlass|cublas|nvjet|splitk|addmm|\bmm\b|matmul|linear|triton_tem|triton_mm"),
    ("copy", r"memcpy|memset|copy_|aten::clone"),
    ("norm and elementwise", r"triton_|elementwise|reduce|norm|cpp_fused|aten::"),
)
"""Parts of a frame and what their kernels' names hold; the first that fits counts."""


def part_of(name: str) -> str:
    """The part that a kernel or operator belongs to."""
    return next((part for part, pattern in PARTS if re.search(pattern, name, re.IGNORECASE)), "other")


def profile_frames(plan: RunPlan, frames: int) -> list[dict[str, Any]]:
    """Kernels of ``frames`` steady frames: name, part, and calls and microseconds per frame, longest first."""
    core = build(lambda: GameRFTCore(plan.arch), plan)
    rollout = assemble(core, plan.conf.quant, plan.conf.kv, plan.setup).rollout
    context, frame = random_inputs(plan, plan.setup.batch)
    rollout.prefill(*context)
    gpu = plan.device.type == "cuda"
    rollout.next_frame(*frame)
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as prof:
        for _ in range(frames):
            rollout.next_frame(*frame)
        if gpu:
            torch.cuda.synchronize()
    spans = _spans(prof.events()) if gpu else {}
    kernels = []
    for event in prof.key_averages():
        total = event.self_device_time_total if gpu else event.self_cpu_time_total
        if total:
            times = {
                "calls": event.count / frames,
                "us": total / frames,
                "span_us": spans.get(event.key, total) / frames,
            }
            kernels.append({"name": event.key, "part": part_of(event.key), **times})
    return sorted(kernels, key=lambda kernel: -kernel["us"])


def _spans(events: Any) -> dict[str, float]:
    """By how many us the kernels of each name put off the end of all so far.

    Kernels overlap, and nothing runs between some: summed, these are the time that passes, idle time in front of a
    kernel included, where the kernels' own times are not.
    """
    spans: dict[str, float] = defaultdict(float)
    ran = sorted((e.time_range.end, e.name) for e in events if e.device_type == torch.autograd.DeviceType.CUDA)
    last = ran[0][0] if ran else 0.0
    for end, name in ran[1:]:
        spans[name] += end - last
        last = end
    return dict(spans)


def summary(kernels: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Time and launches by part, for the frame and per denoising step."""
    parts: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(("us", "span_us", "calls"), 0.0))
    for kernel in kernels:
        for key in ("us", "span_us", "calls"):
            parts[kernel["part"]][key] += kernel[key]
    calls = sum(part["calls"] for part in parts.values())
    return {
        "us": sum(part["us"] for part in parts.values()),
        "span_us": sum(part["span_us"] for part in parts.values()),
        "calls": calls,
        "calls_per_step": calls / steps,
        "parts": dict(sorted(parts.items(), key=lambda item: -item[1]["us"])),
    }


def report(now: dict[str, Any], before: dict[str, Any] | None, top: int) -> str:
    """The figures as text."""
    frame = now["frame"]
    lines = [
        f"one frame: {frame['span_us']:.0f} us pass, kernels take {frame['us']:.0f} us "
        f"in {frame['calls']:.0f} launches, {frame['calls_per_step']:.0f} a step"
    ]
    names = list(frame["parts"])
    if before is not None:
        lines.append(f"before:    {before['frame']['us']:.0f} us in {before['frame']['calls']:.0f} launches")
        names += [name for name in before["frame"]["parts"] if name not in names]
    nothing = {"us": 0.0, "span_us": 0.0, "calls": 0.0}
    for name in names:
        part = frame["parts"].get(name, nothing)
        text = f"  {name:22} {part['span_us']:10.1f} us pass, {part['us']:10.1f} us {part['calls']:7.1f} launches"
        if before is not None:
            text += f"   before {before['frame']['parts'].get(name, nothing)['us']:10.1f} us"
        lines.append(text)
    lines.append("longest:")
    lines += [
        f"  {k['span_us']:10.1f} us pass, {k['us']:10.1f} us {k['calls']:7.1f}×  [{k['part']}] {k['name'][:90]}"
        for k in now["kernels"][:top]
    ]
    return "\n".join(lines)


@patient
def main(argv: list[str] | None = None) -> int:
    """Profile, print, write."""
    args = arguments.profile().parse_args(argv)
    before = read_json(args.before, "an earlier profile") if args.before else None
    register()
    trainer = f"trainer={'gpu' if args.device == 'cuda' else 'cpu'}"
    plan = compose_plan([trainer, "data.batch_size=1", *args.overrides], args.out.parent)
    kernels = profile_frames(plan, args.frames)
    now = {
        "environment": environment(plan.device),
        "overrides": args.overrides,
        "frame": summary(kernels, len(plan.conf.sampler.timesteps)),
        "kernels": kernels,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(now, indent=1) + "\n")
    print(report(now, before, args.top))
    return 0


if __name__ == "__main__":
    sys.exit(main())
