# mypy: allow-untyped-defs
"""The Triton kernels of `flash` and their launches: attention that never holds its T * T weights.

Written from two papers. FA1 is FlashAttention, arXiv:2205.14135: the softmax of a row, computed from one tile of
scores after another (section 3.1), and scores computed again in the backward pass instead of kept (section 3.1 and
appendix B). FA2 is FlashAttention-2, arXiv:2307.08691, whose Algorithm 1 (forward) and Algorithm 2 (backward) are
followed here; "line 9" is one of their lines. Three things differ from them:

  - A bias is added to the scores, and gets a gradient.
  - Algorithm 2 adds up dQ in memory from every tile of keys, which needs atomics and rounds in another order each time.
    Here dQ has a kernel with the loops exchanged. It computes the scores once more, and equal inputs give equal
    gradients to the bit.
  - Scores are kept in powers of two: exp(x) is exp2(x log2(e)), and log2(e) is folded into the scale 1/sqrt(d). GPUs
    have an instruction for exp2 and multiply before it to get exp.

Shapes: B images, A heads, T tokens, d a head's width, and of one tile

    R   queries, rows of the scores (the papers' B_r)
    C   keys, columns of the scores (the papers' B_c)
    E   d rounded up to a power of two, which tl.dot and tl.arange need: what is loaded beyond d is 0

Every tensor is read and written through its strides; sums are float32 in every dtype. What is beyond T is loaded as 0,
never stored, and as a key it has no weight.
"""

import math
from typing import Any, NamedTuple

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from vit.kernels.attention.flash import OPTIONS

INTERPRETED = triton.knobs.runtime.interpret  # decided once, here: triton.jit reads it below
LOG2_E = tl.constexpr(math.log2(math.e))


def from_triton(function: Any) -> Any:
    """A function of Triton's library as the kernels need it.

    Whether it is compiled or interpreted was decided when triton was imported, which torch.compile, for example, may
    have done before TRITON_INTERPRET was set. Then it is made anew.
    """
    return triton.jit(function.fn) if INTERPRETED and isinstance(function, triton.JITFunction) else function


cdiv, zeros, largest, added_up = (from_triton(function) for function in (tl.cdiv, tl.zeros, tl.max, tl.sum))


# Parts of the kernels


@triton.jit
def place(A, tiles):
    """The image, the head and the tile of this program, of programs that have `tiles` tiles per head.

    Tiles of one head come one after another, so that what they share is still in the GPU's cache.
    """
    program = tl.program_id(0)
    head = program // tiles
    return head // A, head % A, program % tiles


@triton.jit
def addresses(x, strides, b, a, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The addresses of a tile of ROWS by COLUMNS whose first element is x[b, a, row, column]: [ROWS, COLUMNS].

    All in 64 bits. What is the same for the whole tile is added up first.
    """
    x += tl.cast(b, tl.int64) * strides[0] + tl.cast(a, tl.int64) * strides[1]
    x += tl.cast(row, tl.int64) * strides[2] + tl.cast(column, tl.int64) * strides[3]
    down = tl.arange(0, ROWS).to(tl.int64)[:, None] * strides[2]  # [ROWS, 1]
    return x + down + tl.arange(0, COLUMNS).to(tl.int64)[None, :] * strides[3]  # [ROWS, COLUMNS]


@triton.jit
def inside(row, column, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which elements of such a tile lie in a matrix of `height` by `width`: [ROWS, COLUMNS]."""
    return (row + tl.arange(0, ROWS) < height)[:, None] & (column + tl.arange(0, COLUMNS) < width)[None, :]


@triton.jit
def load(x, strides, b, a, row, column, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """That tile of x[b, a], a matrix of `height` by `width`, with 0 outside of it: [ROWS, COLUMNS]."""
    mask = inside(row, column, height, width, ROWS, COLUMNS)  # [ROWS, COLUMNS]
    return tl.load(addresses(x, strides, b, a, row, column, ROWS, COLUMNS), mask=mask, other=0.0)


@triton.jit
def store(x, strides, b, a, row, column, height, width, values):
    """Write such a tile in x's dtype, without what lies outside of the matrix."""
    mask = inside(row, column, height, width, values.shape[0], values.shape[1])  # [ROWS, COLUMNS]
    where = addresses(x, strides, b, a, row, column, values.shape[0], values.shape[1])  # [ROWS, COLUMNS]
    tl.store(where, values.to(x.dtype.element_ty), mask=mask)


@triton.jit
def load_row(x, b, a, first, A, T, R: tl.constexpr):
    """x[b, a, first : first + R] of one float32 per token, x [B, A, T] without gaps, and 0 beyond T: [R]."""
    tokens = first + tl.arange(0, R)  # [R]
    return tl.load(x + (tl.cast(b, tl.int64) * A + a) * T + tokens, mask=tokens < T, other=0.0)


@triton.jit
def store_row(x, b, a, first, A, T, values):
    """Write there, without what is beyond T."""
    tokens = first + tl.arange(0, values.shape[0])  # [R]
    tl.store(x + (tl.cast(b, tl.int64) * A + a) * T + tokens, values, mask=tokens < T)


@triton.jit
def scores(left, right, bias, bias_strides, b, a, row, column, T, scale):
    """left right^T * scale + bias, in powers of two, float32: [ROWS, COLUMNS] from [ROWS, E] and [COLUMNS, E].

    Queries may be on the left and keys on the right, or the other way round with a bias whose last two dimensions are
    exchanged. `row` and `column` are the first token of each, `scale` is log2(e) / sqrt(d). Pairs with a token beyond T
    get -inf, so that their weight is 0.
    """
    s = tl.dot(left, tl.trans(right), input_precision="ieee") * scale  # [ROWS, COLUMNS]
    if bias is not None:  # known when the kernel is compiled: without a bias nothing of this remains
        added = load(bias, bias_strides, b, a, row, column, T, T, left.shape[0], right.shape[0])  # [ROWS, COLUMNS]
        s += added.to(tl.float32) * LOG2_E  # [ROWS, COLUMNS]
    return tl.where(inside(row, column, T, T, left.shape[0], right.shape[0]), s, float("-inf"))


# Forward


@triton.jit
def forward_kernel(
    q, k, v, bias, out, lse,
    q_strides, k_strides, v_strides, bias_strides, out_strides,
    A, T, scale, d: tl.constexpr, E: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Algorithm 1 of FA2, one program for each tile of queries: its lines 4 to 15.

    Of each query it keeps m, the largest score so far, ell, the sum of exp(score - m) over the keys so far, and total,
    the sum of exp(score - m) * value. When a tile of keys raises m, the sums shrink by exp(old m - new m) (FA1, section
    3.1). Dividing by ell waits for the end (FA2, section 3.1). lse = m + log(ell), in powers of two here, is all that
    the backward pass needs to compute the weights again.

    A query whose keys all have -inf has no softmax: it is 0 / 0 = NaN, as in `vit.attention.reference`.
    """
    b, a, tile = place(A, cdiv(T, R))
    row = tile * R
    q_tile = load(q, q_strides, b, a, row, 0, T, d, R, E)  # [R, E], line 4
    m = tl.full([R], float("-inf"), tl.float32)  # [R], line 5
    ell = zeros([R], tl.float32)  # [R]
    total = zeros([R, E], tl.float32)  # [R, E]
    for column in range(0, T, C):  # line 6
        k_tile = load(k, k_strides, b, a, column, 0, T, d, C, E)  # [C, E], line 7
        v_tile = load(v, v_strides, b, a, column, 0, T, d, C, E)  # [C, E]
        s = scores(q_tile, k_tile, bias, bias_strides, b, a, row, column, T, scale)  # [R, C], line 8
        new_m = tl.maximum(m, largest(s, 1))  # [R], line 9
        base = tl.where(new_m == float("-inf"), 0.0, new_m)  # [R]: only -inf so far, and -inf - -inf would be NaN
        p = tl.exp2(s - base[:, None])  # [R, C], line 9
        shrink = tl.exp2(m - base)  # [R]
        ell = shrink * ell + added_up(p, 1)  # [R], line 9
        total = tl.dot(p.to(v_tile.dtype), v_tile, shrink[:, None] * total, input_precision="ieee")  # [R, E], line 10
        m = new_m  # [R]
    store(out, out_strides, b, a, row, 0, T, d, total / ell[:, None])  # lines 12 and 14
    store_row(lse, b, a, row, A, T, m + tl.log2(ell))  # lines 13 and 15


# Backward
#
# With P the weights, S the scores and O = P V, FA1 (appendix B.2) derives for one head
#
#     dV = P^T dO,   dP = dO V^T,   dS = P * (dP - delta),   dQ = dS K / sqrt(d),   dK = dS^T Q / sqrt(d)
#
# where delta, one number per query, is rowsum(P * dP), which equals rowsum(dO * O): no sum over T keys is needed. The
# bias is added to S, so its gradient is dS itself, summed over the images and heads that share the bias.


@triton.jit
def delta_kernel(
    out, dout, delta, out_strides, dout_strides,
    A, T, d: tl.constexpr, E: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Line 4 of Algorithm 2 of FA2, one program for each tile of queries: delta = rowsum(dO * O)."""
    b, a, tile = place(A, cdiv(T, R))
    row = tile * R
    o_tile = load(out, out_strides, b, a, row, 0, T, d, R, E).to(tl.float32)  # [R, E]
    do_tile = load(dout, dout_strides, b, a, row, 0, T, d, R, E).to(tl.float32)  # [R, E]
    store_row(delta, b, a, row, A, T, added_up(do_tile * o_tile, 1))


@triton.jit
def key_value_kernel(
    q, k, v, bias_t, dout, lse, delta, dk, dv,
    q_strides, k_strides, v_strides, bias_t_strides, dout_strides, dk_strides, dv_strides,
    A, T, scale, d: tl.constexpr, E: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Algorithm 2 of FA2 without dQ, one program for each tile of keys: its lines 6 to 18.

    Scores stand transposed, keys by queries, since P^T and dS^T are what is multiplied: `bias_t` [B, A, keys, queries].
    """
    b, a, tile = place(A, cdiv(T, C))
    column = tile * C
    k_tile = load(k, k_strides, b, a, column, 0, T, d, C, E)  # [C, E], line 6
    v_tile = load(v, v_strides, b, a, column, 0, T, d, C, E)  # [C, E]
    dk_tile = zeros([C, E], tl.float32)  # [C, E], line 7
    dv_tile = zeros([C, E], tl.float32)  # [C, E]
    for row in range(0, T, R):  # line 8
        q_tile = load(q, q_strides, b, a, row, 0, T, d, R, E)  # [R, E], line 9
        do_tile = load(dout, dout_strides, b, a, row, 0, T, d, R, E)  # [R, E]
        lse_row = load_row(lse, b, a, row, A, T, R)  # [R]
        delta_row = load_row(delta, b, a, row, A, T, R)  # [R]
        s_t = scores(k_tile, q_tile, bias_t, bias_t_strides, b, a, column, row, T, scale)  # [C, R], line 10
        p_t = tl.exp2(s_t - lse_row[None, :])  # [C, R], line 11
        dv_tile = tl.dot(p_t.to(do_tile.dtype), do_tile, dv_tile, input_precision="ieee")  # [C, E], line 12
        dp_t = tl.dot(v_tile, tl.trans(do_tile), input_precision="ieee")  # [C, R], line 13
        ds_t = p_t * (dp_t - delta_row[None, :])  # [C, R], line 14
        dk_tile = tl.dot(ds_t.to(q_tile.dtype), q_tile, dk_tile, input_precision="ieee")  # [C, E], line 16
    store(dk, dk_strides, b, a, column, 0, T, d, dk_tile * (scale / LOG2_E))  # line 18; 1/sqrt(d) from the scale
    store(dv, dv_strides, b, a, column, 0, T, d, dv_tile)


@triton.jit
def score_gradient(
    q_tile, do_tile, lse_row, delta_row, k, v, bias,
    k_strides, v_strides, bias_strides, b, a, row, column, T, d, scale, E: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Lines 10, 11, 13 and 14 of Algorithm 2 of FA2: dS [R, C] of a tile, and the keys [C, E] that it read."""
    k_tile = load(k, k_strides, b, a, column, 0, T, d, C, E)  # [C, E]
    v_tile = load(v, v_strides, b, a, column, 0, T, d, C, E)  # [C, E]
    s = scores(q_tile, k_tile, bias, bias_strides, b, a, row, column, T, scale)  # [R, C], line 10
    p = tl.exp2(s - lse_row[:, None])  # [R, C], line 11
    dp = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee")  # [R, C], line 13
    return p * (dp - delta_row[:, None]), k_tile  # [R, C], line 14, and [C, E]


@triton.jit
def query_kernel(
    q, k, v, bias, dout, lse, delta, dq,
    q_strides, k_strides, v_strides, bias_strides, dout_strides, dq_strides,
    A, T, scale, d: tl.constexpr, E: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Line 15 of Algorithm 2 of FA2, dQ, one program for each tile of queries, over the keys as in `forward_kernel`."""
    b, a, tile = place(A, cdiv(T, R))
    row = tile * R
    q_tile = load(q, q_strides, b, a, row, 0, T, d, R, E)  # [R, E]
    do_tile = load(dout, dout_strides, b, a, row, 0, T, d, R, E)  # [R, E]
    lse_row = load_row(lse, b, a, row, A, T, R)  # [R]
    delta_row = load_row(delta, b, a, row, A, T, R)  # [R]
    dq_tile = zeros([R, E], tl.float32)  # [R, E]
    for column in range(0, T, C):
        ds, k_tile = score_gradient(
            q_tile, do_tile, lse_row, delta_row, k, v, bias,
            k_strides, v_strides, bias_strides, b, a, row, column, T, d, scale, E, C,
        )  # [R, C], [C, E]  # fmt: skip
        dq_tile = tl.dot(ds.to(k_tile.dtype), k_tile, dq_tile, input_precision="ieee")  # [R, E], line 15
    store(dq, dq_strides, b, a, row, 0, T, d, dq_tile * (scale / LOG2_E))  # 1/sqrt(d) from the scale


@triton.jit
def bias_kernel(
    q, k, v, bias, dout, lse, delta, dbias,
    q_strides, k_strides, v_strides, bias_strides, dout_strides, dbias_strides,
    B, A, T, planes, heads, scale, d: tl.constexpr, E: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The bias's gradient, dbias [planes, heads, T, T]: dS, one program for each of its tiles of R queries by C keys.

    Plane p is the sum over the images p, p + planes, p + 2 planes ..., and head h over the heads h, h + heads ... So
    `planes` = B and `heads` = A is a gradient for each image and head; 1 and 1 is the sum over all of them, always
    added up in the same order; and planes between are parts of the sum over images.
    """
    across = cdiv(T, C)
    plane, head, tile = place(heads, cdiv(T, R) * across)
    row = tile // across * R
    column = tile % across * C
    total = zeros([R, C], tl.float32)  # [R, C]
    for b in range(plane, B, planes):
        for a in range(head, A, heads):
            q_tile = load(q, q_strides, b, a, row, 0, T, d, R, E)  # [R, E]
            do_tile = load(dout, dout_strides, b, a, row, 0, T, d, R, E)  # [R, E]
            lse_row = load_row(lse, b, a, row, A, T, R)  # [R]
            delta_row = load_row(delta, b, a, row, A, T, R)  # [R]
            ds, _ = score_gradient(
                q_tile, do_tile, lse_row, delta_row, k, v, bias,
                k_strides, v_strides, bias_strides, b, a, row, column, T, d, scale, E, C,
            )  # [R, C], [C, E]  # fmt: skip
            total += ds  # [R, C]
    store(dbias, dbias_strides, plane, head, row, column, T, T, total)


# Launching them


class Launch(NamedTuple):
    """How a kernel is laid out: R queries and C keys per tile, warps per program, and loads in flight at once."""

    R: int
    C: int
    warps: int
    stages: int


# By padded width E and bytes per number: forward, backward, and backward with a bias, whose tile takes registers too.
# Tensor cores (2 bytes) want large tiles; float32 is multiplied without them ("ieee"), where sums fill the registers
# sooner. Chosen by what the compiler says for Ampere and Hopper: at d = 64 at most 48 bytes a thread spill out of the
# registers, and all fits into the 99 KiB of shared memory that consumer GPUs have. Not tuned on a GPU.
LAUNCHES = {
    (32, 2): (Launch(128, 64, 8, 3), Launch(64, 64, 4, 2), Launch(32, 64, 4, 2)),
    (64, 2): (Launch(128, 64, 8, 3), Launch(64, 64, 4, 2), Launch(32, 64, 4, 2)),
    (128, 2): (Launch(128, 32, 8, 3), Launch(64, 32, 8, 2), Launch(32, 64, 8, 2)),
    (32, 4): (Launch(64, 32, 8, 2), Launch(32, 32, 8, 1), Launch(32, 32, 8, 1)),
    (64, 4): (Launch(64, 32, 8, 2), Launch(32, 32, 8, 1), Launch(32, 32, 8, 1)),
    (128, 4): (Launch(32, 32, 8, 2), Launch(32, 32, 8, 1), Launch(32, 32, 8, 1)),
}
INTERPRETER = Launch(128, 64, 1, 1)  # a step takes equally long for any size; not square, so that swapped sides show
PROGRAMS = 512  # enough to keep any GPU busy: a bias's gradient is split into parts until there are so many


def launch(d: int, dtype: torch.dtype, *, backward: bool = False, bias: bool = False) -> Launch:
    """The layout for heads of width d, from the table; the interpreter has one for all."""
    if INTERPRETED:
        return INTERPRETER
    return LAUNCHES[padded(d), dtype.itemsize][backward * (1 + bias)]


def padded(d: int) -> int:
    """d rounded up to a power of two."""
    return 1 << (d - 1).bit_length()


def heads_apart(x: Tensor) -> Tensor:
    """Memory for a result of x's shape [B, A, T, d], laid out as [B, T, A, d]: merging its heads copies nothing."""
    return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)  # [B, A, T, d]


def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention, and what its backward pass needs.

    Args:
        q, k, v: [B, A, T, d], any strides.
        bias: broadcastable to [B, A, T, T], any strides, or None.

    Returns:
        out [B, A, T, d], its memory lying as [B, T, A, d], and lse [B, A, T], float32: log2 of each query's sum of
        exponentials.
    """
    B, A, T, d = q.shape
    out, lse = heads_apart(q), q.new_empty((B, A, T), dtype=torch.float32)  # [B, A, T, d], [B, A, T]
    if not out.numel():
        return out, lse
    bias, bias_strides = whole(bias, q)
    R, C, warps, stages = launch(d, q.dtype)
    with torch.cuda.device_of(q):  # Triton launches on the current device, which may be another
        forward_kernel[(B * A * triton.cdiv(T, R),)](
            q, k, v, bias, out, lse,
            q.stride(), k.stride(), v.stride(), bias_strides, out.stride(),
            A, T, scale_of(d), d, padded(d), R, C, num_warps=warps, num_stages=stages, **OPTIONS,
        )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of q, k, v [B, A, T, d], lying as `out` does, and of the bias, in its shape, if `bias_grad`.

    Args:
        dout: [B, A, T, d], the gradient of `out`, any strides.
        q, k, v, bias: what `forward` was given.
        out, lse: what it returned.
        bias_grad: whether the bias gets a gradient.
    """
    B, A, T, d = q.shape
    dq, dk, dv = heads_apart(q), heads_apart(q), heads_apart(q)  # [B, A, T, d] each
    if not q.numel():
        return dq, dk, dv, torch.zeros_like(bias) if bias_grad and bias is not None else None
    full, strides = whole(bias, q)
    turned, turned_strides = (None, strides) if full is None else whole(full.mT, q)
    delta = torch.empty_like(lse)  # [B, A, T]
    R, C, warps, stages = launch(d, q.dtype, backward=True, bias=bias is not None)
    sizes = (A, T, scale_of(d), d, padded(d), R, C)
    layout = {"num_warps": warps, "num_stages": stages, **OPTIONS}
    with torch.cuda.device_of(q):
        delta_kernel[(B * A * triton.cdiv(T, R),)](
            out, dout, delta, out.stride(), dout.stride(), A, T, d, padded(d), R, num_warps=warps, **OPTIONS
        )
        key_value_kernel[(B * A * triton.cdiv(T, C),)](
            q, k, v, turned, dout, lse, delta, dk, dv,
            q.stride(), k.stride(), v.stride(), turned_strides, dout.stride(), dk.stride(), dv.stride(),
            *sizes, **layout,
        )  # fmt: skip
        query_kernel[(B * A * triton.cdiv(T, R),)](
            q, k, v, full, dout, lse, delta, dq,
            q.stride(), k.stride(), v.stride(), strides, dout.stride(), dq.stride(),
            *sizes, **layout,
        )  # fmt: skip
        if not bias_grad or bias is None:
            return dq, dk, dv, None
        return dq, dk, dv, bias_gradient(q, k, v, bias, dout, lse, delta)


def bias_gradient(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dout: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """The gradient of `bias`, in its shape and dtype.

    The kernel adds up the images and heads that share a bias. If that leaves it few tiles, each sums a part of the
    images only; adding the parts, and queries or keys that share a bias, is left to PyTorch, in float32. For a bias of
    one row, say, that takes a [T, T] for each of its images and heads, as `reference` does.
    """
    B, A, T, d = q.shape
    full, strides = whole(bias, q)
    shape = (1,) * (4 - bias.ndim) + bias.shape  # [1 or B, 1 or A, 1 or T, 1 or T]
    images, heads = shape[:2]
    R, C, warps, stages = launch(d, q.dtype, backward=True, bias=True)
    tiles = heads * triton.cdiv(T, R) * triton.cdiv(T, C)
    planes = B if images == B else min(B, triton.cdiv(PROGRAMS, tiles))
    summed = (planes, heads, T, T) == shape  # nothing is left to add
    dbias = bias.new_empty((planes, heads, T, T), dtype=bias.dtype if summed else torch.float32)
    bias_kernel[(planes * tiles,)](
        q, k, v, full, dout, lse, delta, dbias,
        q.stride(), k.stride(), v.stride(), strides, dout.stride(), dbias.stride(),
        B, A, T, planes, heads, scale_of(d), d, padded(d), R, C, num_warps=warps, num_stages=stages, **OPTIONS,
    )  # fmt: skip
    return dbias.sum_to_size(bias.shape).to(bias.dtype)


def scale_of(d: int) -> float:
    """What scores are multiplied by: 1/sqrt(d), in powers of two."""
    return math.log2(math.e) / math.sqrt(d)


def whole(bias: Tensor | None, q: Tensor) -> tuple[Tensor | None, tuple[int, ...]]:
    """The bias as [B, A, T, T], with stride 0 where it is broadcast, so that nothing is copied, and its strides."""
    if bias is None:
        return None, (0, 0, 0, 0)
    B, A, T, _ = q.shape
    bias = bias.expand(B, A, T, T)  # [B, A, T, T]
    return bias, bias.stride()
