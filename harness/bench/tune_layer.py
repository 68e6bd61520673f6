"""Find the launch shapes of ``kernel=cuda`` with which whole layers run fastest; prints entries for
``kernels/cuda/tuned``.

    python scripts/tune_layer.py                                # dit_v4, 8, 4 and 16 bits
    python scripts/tune_layer.py --model dit_v4_5b --bits 8 4
    python scripts/tune_layer.py --compare                      # projection and attention in one launch, and in two

A Linear by itself (``microbench.py --tune``) does not show what counts in a frame: kernels are launched while those in
front of them still run (``harness.kernels.launch``), and one that leaves room on a multiprocessor has its weights there
before its input is ready. So here layers run as in a frame, in a CUDA graph: attention over a full ring, sums and
norms, and the four Linears, of which one kind after the other is given each launch shape worth trying. A shape whose
product is wrong is never timed. Needs a Hopper GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import torch
from torch import Tensor

from harness.bench import arguments
from harness.bench.inputs import read_model
from harness.bench.linears import FORMATS
from harness.bench.tune_cuda import checker, other_stages, reason
from harness.kernels import launch
from harness.kernels.cuda import ops as cuda_ops
from harness.kernels.cuda import shapes as cuda_config
from harness.kernels.cuda.linear import PackedLinear
from harness.kernels.cuda.shapes import CudaConfig, Role, suits
from harness.kernels.tuned import entry, gpu_name
from harness.kv import KVConf, KVStorage
from harness.measure.timing import samples_ms
from harness.models.gamerft import BlockModulation, GameRFTCore
from harness.mx.linears import cuda as cuda_linear
from harness.mx.weights import nearest
from harness.rollout import SamplerConf, make_cache
from harness.rollout.attention import FusedAttention, joined
from harness.rollout.linears import pack
from harness.rollout.steps import has_ends, step_ends, streams, through_layer_fused, through_layer_streamed
from harness.streams import patient

FORMAT_OF_BITS = {8: "W8A16", 4: "W4A16", 16: None}
REPLAYS = 12
NAMES = [spec.name for spec in GameRFTCore.block_linears if not spec.per_frame]
ROLES = {"attn.qkv": Role.norm, "attn.out": Role.residual, "mlp.fc1": Role.norm, "mlp.fc2": Role.residual}
"""What a block's Linears do for its norms where these are in their kernels."""

ROUNDS, REFINED, VARIED = 3, 12, 4
"""Of each Linear's launch shapes, the fastest are tried again when those of the others are known, and once, of the
fastest of all, what differs from them in stages alone."""


class Layers:
    """Layers of a model in a CUDA graph, and how long one takes."""

    def __init__(self, core: GameRFTCore, window: int, bits: int, batch: int, storage: KVStorage) -> None:
        arch, device, count = core.cfg, core.proj_in.weight.device, core.cfg.n_layers
        cache = make_cache(core, SamplerConf(window=window), KVConf(storage), batch)
        for layer, frames in enumerate(cache.windows):
            shape = (batch, arch.n_heads, frames * arch.tokens_per_frame, arch.head_dim)
            cache.load(layer, *(torch.randn(shape, device=device).bfloat16() for _ in range(2)))
        cache.advance()
        self.attend = FusedAttention(cache, store=False)
        name, dim = FORMAT_OF_BITS[bits], arch.d_model
        if name is None:
            pack(core)
        else:
            pack(core, lambda linear: cuda_linear.build(nearest(linear, FORMATS[name])))
        self.blocks = core.blocks
        qkv = core.blocks[0].get_submodule("attn.qkv")
        assert isinstance(qkv, PackedLinear)
        joined_kernel = batch == 1 and joined(cache, 0, qkv, store=False) is not None
        tokens = arch.tokens_per_frame
        self.streamed = batch == 1 and has_ends(core, tokens) and all(streams(block, tokens) for block in self.blocks)
        if self.streamed:
            self.ends = step_ends(core, tokens)
            self.latents = torch.randn(1, arch.channels, arch.sample_size, arch.sample_size, device=device)
        # A projection that is part of attention's kernel has no launch shape of its own.
        self.names = [name for name in NAMES if not (self.streamed and joined_kernel and name == "attn.qkv")]
        self.x = torch.randn(batch, arch.tokens_per_frame, dim, device=device).bfloat16()
        self.mods = [
            BlockModulation(*(0.1 * torch.randn(batch, 1, dim, device=device).bfloat16() for _ in range(6)))
            for _ in range(count)
        ]
        angles = torch.rand(arch.tokens_per_frame, arch.head_dim // 2, device=device)
        self.rotary = (angles.cos(), angles.sin())

    def linears(self, name: str) -> list[PackedLinear]:
        """Every layer's Linear of a name such as "mlp.fc1"."""
        found = [block.get_submodule(name) for block in self.blocks]
        assert all(isinstance(linear, PackedLinear) for linear in found)
        return found  # type: ignore[return-value]

    def run(self) -> Tensor:
        """All layers once."""
        if self.streamed:
            return self._run_streamed()
        x, branch, gate = self.x, torch.zeros_like(self.x), self.mods[0].mlp_gate
        for block, mod in zip(self.blocks, self.mods, strict=True):
            x, branch = through_layer_fused(block, self.attend, x, branch, gate, mod, self.rotary)
            gate = mod.mlp_gate
        return x + branch

    def _run_streamed(self) -> Tensor:
        norms = [(mod.attn_scale, mod.attn_shift) for mod in (*self.mods, self.mods[0])]
        stream = self.ends.enter(self.latents, *norms[0])
        for block, mod, norm in zip(self.blocks, self.mods, norms[1:], strict=True):
            stream = through_layer_streamed(block, self.attend, stream, mod, norm, self.rotary)
        return stream.total[None]

    def time(self) -> float:
        """Median µs of a layer."""
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            self.run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self.run()
        times = samples_ms(graph.replay, torch.device("cuda"), REPLAYS, warmup=2)
        return statistics.median(times) * 1e3 / len(self.blocks)


class Tuner:
    """Tries launch shapes of each Linear in turn."""

    def __init__(self, layers: Layers, most: int, deadline: float) -> None:
        self.layers, self.most, self.deadline = layers, most, deadline
        self.timed: dict[str, dict[CudaConfig, float]] = {name: {} for name in layers.names}
        self.want = layers.run() if layers.streamed else None
        self.tried: list[tuple[str, CudaConfig, float]] = []
        self.refused: list[str] = []

    def tune(self) -> dict[str, CudaConfig]:
        """The fastest of each Linear; several rounds, since what one occupies is what another cannot have."""
        for turn in range(ROUNDS):
            for name in self.layers.names:
                linear = self.layers.linears(name)[0]
                shape = linear.shape(self.layers.x[..., 0].numel())
                known = self.timed[name]
                configs = self._again(known, shape, turn) if turn else self._worth_trying(shape, self._role(name))
                configs = [config for config in configs if suits(config, shape, self._role(name))]
                self.timed[name] = {} if turn else known
                self._try(name, [config for config in configs if turn or config not in known])
                self._set(name, min(self.timed[name], key=self.timed[name].__getitem__))
                print(f"  {name}: {min(self.timed[name].values()):.2f} µs a layer", flush=True)
        return {name: min(timed, key=timed.__getitem__) for name, timed in self.timed.items()}

    def _role(self, name: str) -> Role:
        return ROLES[name] if self.layers.streamed else Role.plain

    def _worth_trying(self, shape: cuda_config.CudaShape, role: Role) -> list[CudaConfig]:
        gpu = gpu_name(self.layers.x.device)
        chosen = [cuda_config.choose(shape, gpu, role), cuda_config.choose(shape, gpu)]
        return list(dict.fromkeys([*chosen, *cuda_config.candidates_in_a_layer(shape, self.most)]))

    def _again(self, known: dict[CudaConfig, float], shape: cuda_config.CudaShape, turn: int) -> list[CudaConfig]:
        fastest = sorted(known, key=known.__getitem__)[:REFINED]
        varied = [other for config in fastest[:VARIED] for other in other_stages(config, shape)] if turn == 1 else []
        return list(dict.fromkeys([*fastest, *varied]))

    def _set(self, name: str, config: CudaConfig) -> None:
        for linear in self.layers.linears(name):
            linear.config = config

    def _try(self, name: str, configs: Sequence[CudaConfig]) -> None:
        linear = self.layers.linears(name)[0]
        rows = torch.randn(self.layers.x[..., 0].numel(), linear.in_features, device="cuda").bfloat16()
        check, dependent = checker(linear, rows), launch.dependent(rows.device)
        sizes = linear.in_features, linear.element
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for silu, role in dict.fromkeys([(linear.silu, self._role(name)), (False, Role.plain)]):
                jobs = {c: pool.submit(cuda_ops.compiled, c, *sizes, silu, dependent, role) for c in configs}
            for config in configs:
                if time.monotonic() > self.deadline and self.timed[name]:
                    pool.shutdown(cancel_futures=True)
                    break
                linear.config = config
                if (refusal := reason(jobs[config], check)) is None:
                    self._set(name, config)
                    refusal = self._wrong()
                if refusal is None:
                    self.timed[name][config] = self.layers.time()
                    self.tried.append((name, config, self.timed[name][config]))
                else:
                    self.refused.append(f"{name} {config}: {refusal}")

    def _wrong(self) -> str | None:
        """What is wrong with the layers where norms are in their products; these were checked without."""
        if self.want is None:
            return None
        first, second, want = self.layers.run(), self.layers.run(), self.want.double()
        if not torch.equal(first, second):
            return "the layers differ from call to call"
        error = float((first.double() - want).norm() / want.norm())
        return None if error < 0.02 else f"the layers are {error:.3f} from what they were"


def compare(name: str, layers: Layers) -> dict[str, list[float]]:
    """µs of a layer in which projection and attention are one launch, and in which they are two, in turns."""
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(ROUNDS):
        for join, found in times.items():
            layers.attend.join = join
            found.append(layers.time())
    one, two = (", ".join(f"{us:.2f}" for us in found) for found in times.values())
    print(f"{name}, µs a layer: projection and attention in one launch {one}; in two {two}", flush=True)
    return {"one launch": times[True], "two launches": times[False]}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command's arguments; ends with exit code 2 without a GPU."""
    parser = arguments.tune_layer()
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("needs a Hopper GPU; torch sees no CUDA GPU here")
    return args


@patient
@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> int:
    """Search, print entries; 2 where there is nothing to tune."""
    args = parse(argv)
    arch, window = read_model(args.model)
    rows = args.batch * arch.tokens_per_frame
    if rows > cuda_config.MANY_ROWS:
        unpacked = f"of more than {cuda_config.MANY_ROWS} weights are unpacked for a library's product"
        print(f"--batch {args.batch}: {rows} rows; {unpacked}, nothing to tune; give fewer clips", file=sys.stderr)
        return 2
    found = []
    for bits in args.bits:
        start = time.monotonic()
        with torch.device("cuda"):
            core = GameRFTCore(replace(arch, n_layers=args.layers)).requires_grad_(False).bfloat16()
        layers = Layers(core, window, bits, args.batch, KVStorage(args.kv))
        if args.compare:
            found.append({"bits": bits, **compare(f"{args.model}, {bits} bits", layers)})
            continue
        print(f"{args.model}, {bits} bits: {layers.time():.2f} µs a layer at first", flush=True)
        tuner = Tuner(layers, args.most, start + args.seconds)
        best = tuner.tune()
        print(f"{args.model}, {bits} bits: {layers.time():.2f} µs a layer, {time.monotonic() - start:.0f} s")
        for name, config in best.items():
            shape = layers.linears(name)[0].shape(layers.x[..., 0].numel())
            key: dict[str, object] = {"bits": shape.bits, "m": shape.bucket, "n": shape.n, "k": shape.k}
            if layers.streamed:
                key["role"] = str(ROLES[name])
            print(f"    {entry(key | {'config': config.as_ints()})}", flush=True)
            tried = [[*c.as_ints(), us] for tried_name, c, us in tuner.tried if tried_name == name]
            found.append({"shape": list(key.values()), "best": asdict(config), "us": tried})
        print("".join(f"  REFUSED {line}\n" for line in tuner.refused), end="", flush=True)
        del core, layers, tuner
        torch.cuda.empty_cache()
    if args.json:
        args.json.write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
