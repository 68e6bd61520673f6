"""Compile the kernels for sm_90 without a GPU; prints a line per kernel. Run as a process without TRITON_INTERPRET."""

import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from harness.rollout.fused import encoding
from harness.rollout.kernels.heads import heads_kernel
from harness.rollout.kernels.window import combine_kernel, window_kernel

RING = {"plain": ("*bf16", "*i64"), "int8": ("*i8", "*bf16")}
SIZES = {"HEADS": 24, "FRAMES": 60, "TOKENS": 64, "DIM": 64}
STRIDES = [f"{x}_{axis}" for x in "qkv" for axis in ("batch", "head", "token")]


def compiled(kernel, types, constants, **options):
    names = [parameter.name for parameter in kernel.params]
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = [i for i, name in enumerate(names) if signature[name][0] == "*" or name in STRIDES]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def rings(**formats):
    types = {}
    for name, fmt in formats.items():
        types[f"{name}_ring"], types[f"{name}_scales"] = RING.get(fmt, ("*u8", "*u8"))
    return types


def window(k, v):
    types = dict.fromkeys(("q", "k", "v", "out"), "*bf16") | dict.fromkeys(("sums", "stats"), "*fp32")
    per = {f"{name}_PER": "token" if fmt == "int8" else "block" for name, fmt in (("K", k), ("V", v))}
    constants = SIZES | per | {"SHARE": 6, "SPLITS": 10, "K_FORMAT": k, "V_FORMAT": v, "BLOCK_M": 64, "BLOCK_N": 64}
    types |= rings(k=k, v=v) | {"slot": "*i64", "scale": "fp32"}
    return compiled(window_kernel, types, constants, num_warps=4, num_stages=3)


def heads(fmt):
    types = dict.fromkeys(("qkv", "q_out", "k_out"), "*bf16") | dict.fromkeys(("cos", "sin"), "*fp32")
    constants = SIZES | {"EPS": 1e-7, "RCEIL": True, "ROWS": 8}
    for name in "KV":
        keys = (f"{name}_{field}" for field in ("STORE", "FORMAT", "LARGEST", "EMAX", "THRESHOLD"))
        constants |= dict(zip(keys, encoding(True, fmt, "rceil"), strict=True))
    return compiled(heads_kernel, types | rings(k=fmt, v=fmt) | {"slot": "*i64"}, constants, num_warps=1)


def combine():
    sizes = {name: SIZES[name] for name in ("HEADS", "TOKENS", "DIM")} | {"SPLITS": 10, "SPLITS_PADDED": 16, "BLOCK": 4}
    return compiled(combine_kernel, {"sums": "*fp32", "stats": "*fp32", "out": "*bf16"}, sizes, num_warps=2)


def show(name, kernel):
    print(name, "wgmma", len(re.findall(r"wgmma\.mma_async", kernel.asm["ptx"])), "shared", kernel.metadata.shared)


if __name__ == "__main__":
    for pair in sys.argv[1:]:
        show(pair, window(*pair.split("/")))
    show("combine", combine())
    show("heads", heads("e4m3"))
