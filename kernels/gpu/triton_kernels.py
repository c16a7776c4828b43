# mypy: allow-untyped-defs
"""The Triton kernels of a fused block: products that begin with a LayerNorm and end in GELU or the residual's sum.

Activations are rows of a matrix: M tokens of all images, one after another, by K or N channels. Of one tile

    R   rows (tokens) of it
    C   columns (output channels, or hidden ones in the MLP)
    E   how much of K is multiplied at a time

Every kernel is launched on as many programs as the GPU holds, and each takes one tile after another (every
`num_programs`-th), so that storing one tile overlaps with loading the next. Sums are float32 in every dtype. Matrices
come as tensor descriptors, which load 0 beyond the matrix and store nothing there, and by which Hopper's copy engine
moves whole tiles without spending registers on addresses.

A LayerNorm before a product needs no pass of its own. With x one row, mean and std its own, gamma and beta the norm's,

    ((x - mean) / std * gamma + beta) W^T + b  =  (x G^T - mean * sums) / std + c

where G = W * gamma, sums = G's row sums and c = W beta + b are known beforehand (`fused.fold_norm`). So x goes into the
product as it is in memory, rounded no further, and mean and std are found on the way.
"""

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from ..attention.flash_kernels import added_up, cdiv, zeros


@triton.jit
def vector(x, first, length, COUNT: tl.constexpr):
    """x[first : first + COUNT], with 0 beyond its length: [COUNT]."""
    places = first + tl.arange(0, COUNT)
    return tl.load(x + places, mask=places < length, other=0.0)


@triton.jit
def moments(x_tile):
    """The sum and the sum of squares of each row of a tile: [R], [R]."""
    x = x_tile.to(tl.float32)
    return added_up(x, 1), added_up(x * x, 1)


@triton.jit
def mean_and_std(total, squares, K: tl.constexpr, eps):
    """LayerNorm's mean, and one over its standard deviation: [R], [R].

    The difference of squares loses digits if a row's mean is far larger than its deviation: in float16 a mean of 100
    deviations costs nothing measurable, one of 1000 gives an error of 5 %. In a ViT's stream it is below 1.
    """
    mean = total / K
    variance = squares / K - mean * mean
    return mean, tl.rsqrt(tl.where(variance < 0.0, 0.0, variance) + eps)  # NaN stays NaN


@triton.jit
def activate(x, GELU: tl.constexpr):
    """GELU, "erf" or by "tanh" (arXiv:1606.08415), or nothing: ""."""
    if GELU == "erf":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    if GELU == "tanh":  # (1 + tanh(u)) / 2 is the sigmoid of 2u
        x = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    return x


@triton.jit(do_not_specialize=["M"])
def linear_kernel(
    x, weight, bias, sums, residual, out,
    M, N: tl.constexpr, K: tl.constexpr, eps, GELU: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """out [M, N] = activation(norm(x) W^T + b) + residual; x [M, K], W [N, K].

    Without `sums` there is no norm, without `residual` no sum. Tiles that share rows come one after another, so that
    these rows are still in the GPU's cache.
    """
    across: tl.constexpr = (N + C - 1) // C
    for tile in range(tl.program_id(0), cdiv(M, R) * across, tl.num_programs(0)):
        row, column = tile // across * R, tile % across * C
        product = zeros([R, C], tl.float32)  # [R, C]
        total, squares = zeros([R], tl.float32), zeros([R], tl.float32)  # [R]
        for k in range(0, K, E):
            x_tile = x.load([row, k])  # [R, E]
            product = tl.dot(x_tile, tl.trans(weight.load([column, k])), product, input_precision="ieee")  # [R, C]
            if sums is not None:  # known when the kernel is compiled
                one, two = moments(x_tile)
                total += one
                squares += two
        if sums is not None:
            mean, over_std = mean_and_std(total, squares, K, eps)  # [R]
            product -= mean[:, None] * vector(sums, column, N, C)[None, :]
            product *= over_std[:, None]
        y = activate(product + vector(bias, column, N, C)[None, :], GELU)  # [R, C]
        if residual is not None:
            y += residual.load([row, column]).to(tl.float32)
        out.store([row, column], y.to(out.dtype))


@triton.jit
def finish(x, y, bias, out, row, column, D, RESIDUAL: tl.constexpr):
    """Add the bias, and the stream, to a tile of fc2's product, and write it."""
    y += vector(bias, column, D, y.shape[1])[None, :]
    if RESIDUAL:  # read once more: it is in the GPU's cache, and registers are short
        y += x.load([row, column]).to(tl.float32)
    out.store([row, column], y.to(out.dtype))


@triton.jit(do_not_specialize=["M"])
def mlp_kernel(
    x, weight1, bias1, sums1, weight2, bias2, out,
    M, H: tl.constexpr, D: tl.constexpr, eps, GELU: tl.constexpr, RESIDUAL: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """out [M, D] = x + fc2(gelu(fc1(norm(x)))); W1 [H, D], W2 [D, H]. The hidden layer exists C channels at a time.

    D is no power of two, which tiles are: rows are held in thirds, D = 3 E with E a power of two, as in ViT-Ti and
    ViT-S. Without RESIDUAL what would be added to x is given.
    """
    E: tl.constexpr = D // 3
    for tile in range(tl.program_id(0), cdiv(M, R), tl.num_programs(0)):
        row = tile * R
        x0, x1, x2 = x.load([row, 0]), x.load([row, E]), x.load([row, 2 * E])  # [R, E] each
        total0, squares0 = moments(x0)  # [R]
        total1, squares1 = moments(x1)
        total2, squares2 = moments(x2)
        mean, over_std = mean_and_std(total0 + total1 + total2, squares0 + squares1 + squares2, D, eps)  # [R]
        y0, y1, y2 = zeros([R, E], tl.float32), zeros([R, E], tl.float32), zeros([R, E], tl.float32)  # [R, E]
        for h in range(0, H, C):
            hidden = zeros([R, C], tl.float32)  # [R, C]
            hidden = tl.dot(x0, tl.trans(weight1.load([h, 0])), hidden, input_precision="ieee")
            hidden = tl.dot(x1, tl.trans(weight1.load([h, E])), hidden, input_precision="ieee")
            hidden = tl.dot(x2, tl.trans(weight1.load([h, 2 * E])), hidden, input_precision="ieee")
            hidden -= mean[:, None] * vector(sums1, h, H, C)[None, :]
            hidden = activate(hidden * over_std[:, None] + vector(bias1, h, H, C)[None, :], GELU)  # [R, C]
            narrow = hidden.to(x0.dtype)  # [R, C]
            y0 = tl.dot(narrow, tl.trans(weight2.load([0, h])), y0, input_precision="ieee")  # [R, E]
            y1 = tl.dot(narrow, tl.trans(weight2.load([E, h])), y1, input_precision="ieee")
            y2 = tl.dot(narrow, tl.trans(weight2.load([2 * E, h])), y2, input_precision="ieee")
        finish(x, y0, bias2, out, row, 0, D, RESIDUAL)
        finish(x, y1, bias2, out, row, E, D, RESIDUAL)
        finish(x, y2, bias2, out, row, 2 * E, D, RESIDUAL)


@triton.jit(do_not_specialize=["B", "h", "w"])
def patches_kernel(
    images, weight, bias, positions, out,
    image_stride, channel_stride, line_stride, pixel_stride, out_stride,
    B, h, w, first, p: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    BYTES: tl.constexpr, R: tl.constexpr, C: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """out [B, T, D], rows `first` and on = the patches of images [B, chans, h p, w p] times W [D, K], + positions.

    K = chans p p, in the order of the convolution's weights; bias [D], positions [h w, D]. Pixels are read where they
    lie, in any dtype, BYTES as 256ths: a patch is never copied.
    """
    across: tl.constexpr = (D + C - 1) // C
    N = h * w
    for tile in range(tl.program_id(0), cdiv(B * N, R) * across, tl.num_programs(0)):
        column = tile % across * C
        patch = tile // across * R + tl.arange(0, R)  # [R], of all images
        b, n = (patch // N).to(tl.int64), (patch % N).to(tl.int64)  # 64 bits: strides may be as large as a batch
        there = patch < B * N
        corner = b * image_stride + n // w * p * line_stride + n % w * p * pixel_stride  # [R], its upper left pixel
        product = zeros([R, C], tl.float32)  # [R, C]
        for start in range(0, K, E):
            k = (start + tl.arange(0, E)).to(tl.int64)  # [E]: channel, line and pixel within a patch
            pixel = k // (p * p) * channel_stride + k // p % p * line_stride + k % p * pixel_stride
            pixels = tl.load(images + corner[:, None] + pixel[None, :], mask=there[:, None] & (k < K)[None, :], other=0)
            w_tile = weight.load([column, start])  # [C, E]
            if BYTES:
                pixels = pixels.to(tl.float32) * (1.0 / 256)  # exact in every dtype
            product = tl.dot(pixels.to(w_tile.dtype), tl.trans(w_tile), product, input_precision="ieee")  # [R, C]
        columns = column + tl.arange(0, C)
        mask = there[:, None] & (columns < D)[None, :]
        at = tl.load(positions + n[:, None] * D + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        y = product + vector(bias, column, D, C)[None, :] + at  # [R, C]
        rows = out + b[:, None] * out_stride + (first + n)[:, None] * D + columns[None, :]
        tl.store(rows, y.to(out.dtype.element_ty), mask=mask)
