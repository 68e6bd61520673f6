"""A residual sum and the modulated norm of what it gives, in one launch."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def residual_norm_kernel(
    x,
    branch,
    gate,
    scale,
    shift,
    total,
    normed,
    gate_stride,
    scale_stride,
    shift_stride,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Grid (rows). ``total = x + gate * branch``, ``normed = rms_norm(total) * (1 + scale) + shift``.

    Contiguous ``x, branch, total, normed [rows, DIM]``; ``gate, scale, shift`` have a row for every ``TOKENS`` rows,
    the strides apart. ``WIDTH``: DIM or the next power of two. Rounds where the eager model does. ``DEPENDENT``:
    launched as ``harness.kernels.launch`` describes.
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    DTYPE: tl.constexpr = x.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    clip = row // TOKENS
    columns = tl.arange(0, WIDTH)
    ok = columns < DIM
    place = row * DIM + columns
    a = tl.load(x + place, mask=ok, other=0.0).to(tl.float32)
    b = tl.load(branch + place, mask=ok, other=0.0).to(tl.float32)
    g = tl.load(gate + clip * gate_stride + columns, mask=ok, other=0.0).to(tl.float32)
    m = tl.load(scale + clip * scale_stride + columns, mask=ok, other=0.0).to(tl.float32)
    s = tl.load(shift + clip * shift_stride + columns, mask=ok, other=0.0).to(tl.float32)
    h = (a + (b * g).to(DTYPE).to(tl.float32)).to(DTYPE)
    tl.store(total + place, h, mask=ok)
    h = h.to(tl.float32)
    n = (h * tl.rsqrt(tl.sum(h * h, 0) / DIM + EPS)).to(DTYPE).to(tl.float32)
    n = (n * (1 + m).to(DTYPE).to(tl.float32)).to(DTYPE).to(tl.float32)
    tl.store(normed + place, (n + s).to(DTYPE), mask=ok)
