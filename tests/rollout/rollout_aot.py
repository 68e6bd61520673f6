"""Compile the kernel for sm_90 without a GPU; prints a line per variant. Run as a process without TRITON_INTERPRET."""

import re
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from harness.kernels.triton.window import window_kernel
from harness.rollout import fused

RING = {"plain": ("*bf16", "*i64"), "i8": ("*i8", "*bf16")}
TENSORS = {"cos": "*fp32", "sin": "*fp32", "parts": "*i32", "slot": "*i64", "arrived": "*i32"}


def compiled(kernel, types, constants, **options):
    names = [parameter.name for parameter in kernel.params]
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = [i for i, name in enumerate(names) if signature[name][0] == "*"]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def window(k, v, basis="own", heads=24, dim=64, frames=60, tokens=64):
    """A frame's last step, on an H200; ``basis``: "hadamard" for a ring that is turned."""
    fused._multiprocessors = lambda device: 132
    shape = fused.launch_shape(frames, tokens, dim, heads, torch.device("cpu"))
    types = dict.fromkeys(("qkv", "out", "own_k"), "*bf16") | TENSORS | {"scale": "fp32"}
    constants = {"HEADS": heads, "FRAMES": frames, "TOKENS": tokens, "DIM": dim, "EPS": 1e-7}
    constants |= {"SHARE": shape.share, "SPLITS": shape.splits}
    constants |= {
        "BLOCK_M": shape.block_m,
        "BLOCK_N": shape.block_n,
        "REST": shape.rest,
        "OWN": shape.own,
        "SHARES": shape.combiners,
        "POLLS": fused.POLLS,
        "KEEP_K": k == "i8",
        "K_TURN": basis == "hadamard",
        "V_TURN": basis == "hadamard",
        "EMPTY": fused.EMPTY,
        "DEPENDENT": True,
        "HELD": fused.held_tiles(frames, tokens, dim, shape, torch.device("cpu"), fused.WindowConfig()),
    }
    for name, fmt in (("K", k), ("V", v)):
        types[f"{name.lower()}_ring"], types[f"{name.lower()}_scales"] = RING.get(fmt, ("*u8", "*u8"))
        fields = (f"{name}_{field}" for field in ("FORMAT", "PER", "STORE", "LARGEST", "EMAX", "THRESHOLD"))
        encoding = fused.encoding(fmt != "i8", fmt, "rceil")
        constants |= dict(zip(fields, (fmt, "token" if fmt == "i8" else "block", *encoding), strict=True))
    return compiled(
        window_kernel, types, constants, num_warps=fused.WARPS, num_stages=fused.stages(dim), launch_pdl=True
    )


def show(pair, kernel):
    """Counts of products, of copies to shared memory, and of the loop over tiles' loads that it must wait for."""
    loop = re.search(
        r"scf\.for[^\n]*iter_args(?:(?!scf\.(?:for|yield)).)*?warp_group_dot.*?scf\.yield",
        kernel.asm["ttgir"],
        re.DOTALL,
    ).group()
    print(
        pair,
        *("wgmma", len(re.findall(r"wgmma\.mma_async", kernel.asm["ptx"]))),
        *("shared", kernel.metadata.shared),
        *("asynchronous", loop.count("async_copy_global_to_local")),
        *("awaited", loop.count("tt.load")),
    )


def variant(words):
    """``k/v[/basis][/heads=…][/frames=…][/tokens=…][/dim=…]``."""
    given = words.split("/")
    sizes = dict(word.split("=") for word in given if "=" in word)
    return window(*(word for word in given if "=" not in word), **{name: int(size) for name, size in sizes.items()})


if __name__ == "__main__":
    for pair in sys.argv[1:]:
        show(pair, variant(pair))
