"""What a frame's controls add to its conditioning: two MLPs of a few rows, in two launches.

Such products only stream their weights: each program has its part of them in registers before its inputs are there.
Rounds where the eager model does.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def part_of(weight, outputs, WIDTH: tl.constexpr, SPAN: tl.constexpr):
    """Rows ``outputs`` of ``weight [N, WIDTH]``; ``SPAN``: WIDTH or the next power of two."""
    columns = tl.arange(0, SPAN)
    return tl.load(weight + outputs[:, None] * WIDTH + columns[None, :], mask=columns[None, :] < WIDTH, other=0.0)


@triton.jit
def product(x, tile, bias, row, WIDTH: tl.constexpr, SPAN: tl.constexpr):
    """Float32 of ``x[row] @ tile.T + bias``, rounded to the dtype of ``x [rows, WIDTH]``."""
    columns = tl.arange(0, SPAN)
    inputs = tl.load(x + row * WIDTH + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    sums = tl.sum(tile.to(tl.float32) * inputs[None, :], 1) + bias
    return sums.to(x.dtype.element_ty).to(tl.float32)


@triton.jit
def silu(x, DTYPE: tl.constexpr):
    """SiLU of ``x``, float32, in ``DTYPE``."""
    return (x / (1 + tl.exp(-x))).to(DTYPE)


@triton.jit
def activated_rows(
    x,
    weight,
    bias,
    out,
    outputs,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,
    HIDDEN: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """``out [ROWS, HIDDEN]`` at ``outputs``: SiLU of ``x [ROWS, WIDTH] @ weight.T + bias``.

    ``x`` is waited for, ``weight`` and ``bias`` are not.
    """
    tile = part_of(weight, outputs, WIDTH, SPAN)
    shift = tl.load(bias + outputs).to(tl.float32)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    for row in tl.static_range(ROWS):
        tl.store(out + row * HIDDEN + outputs, silu(product(x, tile, shift, row, WIDTH, SPAN), out.dtype.element_ty))


@triton.jit
def hidden_kernel(
    mouse,
    button,
    mouse_weight,
    mouse_bias,
    button_weight,
    button_bias,
    hidden,
    ROWS: tl.constexpr,
    MOUSE: tl.constexpr,
    MOUSE_SPAN: tl.constexpr,
    BUTTON: tl.constexpr,
    BUTTON_SPAN: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Grid (2 * HIDDEN / BLOCK): ``hidden [2, ROWS, HIDDEN]``, SiLU of the first Linear of each MLP.

    ``mouse [ROWS, MOUSE]``, ``button [ROWS, BUTTON]``. ``DEPENDENT``: launched as ``harness.kernels.launch`` describes.
    """
    of_mouse = tl.program_id(0) < HIDDEN // BLOCK
    outputs = (tl.program_id(0) % (HIDDEN // BLOCK)) * BLOCK + tl.arange(0, BLOCK)
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    # Tiles of two shapes: each in a function of its own, since what a branch names must have one type in both.
    if of_mouse:
        activated_rows(
            mouse, mouse_weight, mouse_bias, hidden, outputs, ROWS, MOUSE, MOUSE_SPAN, HIDDEN, DEPENDENT
        )  # fmt: skip
    else:
        activated_rows(
            button, button_weight, button_bias, hidden + ROWS * HIDDEN, outputs,
            ROWS, BUTTON, BUTTON_SPAN, HIDDEN, DEPENDENT,
        )  # fmt: skip


@triton.jit
def conditioning_kernel(
    hidden,
    mouse_weight,
    mouse_bias,
    button_weight,
    button_bias,
    times,
    out,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    HIDDEN: tl.constexpr,
    HIDDEN_SPAN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Grid (WIDTH / BLOCK): ``out [ROWS, STEPS, WIDTH]``, SiLU of ``times``, the steps' embedded times, plus both MLPs.

    ``hidden``: of :func:`hidden_kernel`. ``times``: of the shape of ``out``. ``DEPENDENT``: as there.
    """
    DTYPE: tl.constexpr = out.dtype.element_ty
    outputs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    of_mouse = part_of(mouse_weight, outputs, HIDDEN, HIDDEN_SPAN)
    of_button = part_of(button_weight, outputs, HIDDEN, HIDDEN_SPAN)
    mouse_shift = tl.load(mouse_bias + outputs).to(tl.float32)
    button_shift = tl.load(button_bias + outputs).to(tl.float32)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    for row in tl.static_range(ROWS):
        mouse = product(hidden, of_mouse, mouse_shift, row, HIDDEN, HIDDEN_SPAN)
        button = product(hidden, of_button, button_shift, ROWS + row, HIDDEN, HIDDEN_SPAN)
        controls = (mouse + button).to(DTYPE).to(tl.float32)
        for step in tl.static_range(STEPS):
            place = (row * STEPS + step) * WIDTH + outputs
            total = (tl.load(times + place).to(tl.float32) + controls).to(DTYPE).to(tl.float32)
            tl.store(out + place, silu(total, DTYPE))
