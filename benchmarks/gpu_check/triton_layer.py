"""`torch_network.decode_layer` with a few Triton kernels instead of a compiler."""

import torch
import triton
import triton.language as tl

from keras_openllama.generation.pytorch import network as torch_network

BLOCK = 32  # Columns of the cache that a program reads at once.


@triton.jit
def add_norm_kernel(
    x, added, scale, total, normed, epsilon, WIDTH: tl.constexpr, PADDED: tl.constexpr
):
    """total = x + added; normed = rms_norm(total)."""
    row = tl.program_id(0)
    i = tl.arange(0, PADDED)
    inside = i < WIDTH
    value = tl.load(x + row * WIDTH + i, inside, other=0.0).to(tl.float32)
    value += tl.load(added + row * WIDTH + i, inside, other=0.0).to(tl.float32)
    value = value.to(total.dtype.element_ty)  # Rounded as in eager mode.
    tl.store(total + row * WIDTH + i, value, inside)
    value = value.to(tl.float32)
    factor = tl.rsqrt(tl.sum(value * value) / WIDTH + epsilon)
    value = value * factor * tl.load(scale + i, inside, other=0.0).to(tl.float32)
    tl.store(normed + row * WIDTH + i, value.to(normed.dtype.element_ty), inside)


@triton.jit
def rotate_and_store_kernel(
    q,
    k,
    v,
    q_row,
    kv_row,
    cos,
    sin,
    rotated,
    keys,
    values,
    column,
    batch,
    columns,
    heads,
    kv_heads,
    HALF: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Rotates a head of q; of the first programs also one of k, and writes k and v."""
    b = tl.program_id(0)
    h = tl.program_id(1)
    i = tl.arange(0, PADDED)
    inside = i < HALF
    c = tl.load(cos + b * HALF + i, inside, other=0.0)
    s = tl.load(sin + b * HALF + i, inside, other=0.0)
    source = q + b * q_row + h * 2 * HALF
    first = tl.load(source + i, inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + i, inside, other=0.0).to(tl.float32)
    out = rotated + (b * heads + h) * 2 * HALF
    dtype = rotated.dtype.element_ty
    tl.store(out + i, (first * c - second * s).to(dtype), inside)
    tl.store(out + HALF + i, (second * c + first * s).to(dtype), inside)
    if h < kv_heads:
        at = tl.load(column)
        place = ((h * batch + b).to(tl.int64) * columns + at) * 2 * HALF
        source = k + b * kv_row + h * 2 * HALF
        first = tl.load(source + i, inside, other=0.0).to(tl.float32)
        second = tl.load(source + HALF + i, inside, other=0.0).to(tl.float32)
        tl.store(keys + place + i, (first * c - second * s).to(dtype), inside)
        tl.store(keys + place + HALF + i, (second * c + first * s).to(dtype), inside)
        source = v + b * kv_row + h * 2 * HALF
        first_value = tl.load(source + i, inside, other=0.0)
        second_value = tl.load(source + HALF + i, inside, other=0.0)
        tl.store(values + place + i, first_value, inside)
        tl.store(values + place + HALF + i, second_value, inside)


@triton.jit
def attend_kernel(
    q,
    keys,
    values,
    bias,
    column,
    context,
    maxima,
    sums,
    batch,
    columns,
    used,
    heads,
    group,
    scale,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Attention of one query over one of `SPLITS` parts of the columns in use."""
    row = tl.program_id(0)  # batch * heads
    split = tl.program_id(1)
    b = row // heads
    h = row % heads
    d = tl.arange(0, PADDED)
    inside = d < D
    query = tl.load(q + row * D + d, inside, other=0.0).to(tl.float32)
    place = ((h // group) * batch + b).to(tl.int64) * columns * D
    blocks = tl.cdiv(tl.load(column).to(tl.int32) + 1, BLOCK)
    part = tl.cdiv(blocks, SPLITS)
    largest = -1e30
    total = 0.0
    summed = tl.zeros([PADDED], tl.float32)
    end = tl.minimum((split + 1) * part, blocks)
    for block in range(split * part, end):
        n = block * BLOCK + tl.arange(0, BLOCK)
        valid = n < used
        pointers = place + n[:, None] * D + d[None]
        mask = valid[:, None] & inside[None]
        key = tl.load(keys + pointers, mask, other=0.0).to(tl.float32)
        score = tl.sum(key * query[None], axis=1) * scale
        score = score + tl.load(bias + b * used + n, valid, other=-1e30)
        new = tl.maximum(largest, tl.max(score, axis=0))
        weight = tl.exp(score - new)
        rescale = tl.exp(largest - new)
        value = tl.load(values + pointers, mask, other=0.0).to(tl.float32)
        summed = summed * rescale + tl.sum(weight[:, None] * value, axis=0)
        total = total * rescale + tl.sum(weight, axis=0)
        largest = new
    to = row * SPLITS + split
    if SPLITS == 1:
        result = (summed / total).to(context.dtype.element_ty)
        tl.store(context + row * D + d, result, inside)
    else:
        tl.store(context + to * D + d, summed, inside)
        tl.store(maxima + to, largest)
        tl.store(sums + to, total)


@triton.jit
def combine_kernel(
    parts,
    maxima,
    sums,
    context,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0)
    d = tl.arange(0, PADDED)
    n = row * SPLITS + tl.arange(0, SPLITS)
    inside = d < D
    largest = tl.load(maxima + n)
    factor = tl.exp(largest - tl.max(largest, axis=0))
    total = tl.sum(tl.load(sums + n) * factor, axis=0)
    part = tl.load(parts + n[:, None] * D + d[None], inside[None], other=0.0)
    result = tl.sum(part * factor[:, None], axis=0) / total
    tl.store(context + row * D + d, result.to(context.dtype.element_ty), inside)


@triton.jit
def silu_kernel(gate, up, out, row, width, BLOCK: tl.constexpr):
    b = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < width
    g = tl.load(gate + b * row + i, inside, other=0.0).to(tl.float32)
    u = tl.load(up + b * row + i, inside, other=0.0).to(tl.float32)
    result = g / (1 + tl.exp(-g)) * u
    tl.store(out + b * width + i, result.to(out.dtype.element_ty), inside)


@triton.jit
def gemv_kernel(x, w, y, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """y = w @ x for one vector; `ROWS` divides the number of rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK)
    at = w + row.to(tl.int64)[:, None] * K
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        inside = start + k < K
        vector = tl.load(x + start + k, inside, other=0.0).to(tl.float32)
        matrix = tl.load(
            at + (start + k)[None],
            inside[None],
            other=0.0,
            eviction_policy="evict_first",
        )
        total += matrix.to(tl.float32) * vector[None]
    tl.store(y + row, tl.sum(total, axis=1).to(y.dtype.element_ty))


# Rows and columns of a tile, and warps, of `gemv`.
GEMV = [4, 512, 4]


def gemv(x, linear):
    """`torch_network.project` of one vector."""
    rows, width = linear.kernel.shape
    tile, block, warps = GEMV
    if x.shape[0] * x.shape[1] > 1 or rows % tile:
        return torch_network.project(x, linear)
    y = torch.empty((1, 1, rows), dtype=x.dtype, device=x.device)
    gemv_kernel[(rows // tile,)](
        *(x, linear.kernel, y), K=width, ROWS=tile, BLOCK=block, num_warps=warps
    )
    return y


def add_norm(x, added, scale, epsilon):
    total, normed = torch.empty_like(x), torch.empty_like(x)
    width = x.shape[-1]
    add_norm_kernel[(x.shape[0],)](
        *(x, added, scale, total, normed, epsilon),
        WIDTH=width,
        PADDED=triton.next_power_of_2(width),
        num_warps=8,
    )
    return total, normed


def attend(query, keys, values, bias, column):
    """Attention of `(batch, heads, head_dim)` queries over the cache."""
    batch, heads, dim = query.shape
    rows, padded = batch * heads, triton.next_power_of_2(dim)
    kv_heads, columns, used = keys.shape[0] // batch, keys.shape[1], bias.shape[1]
    splits = triton.next_power_of_2(max(1, min(16, used // 64, 1024 // rows)))
    context = torch.empty_like(query)
    parts, maxima, sums = context, context, context
    if splits > 1:
        new = lambda *shape: torch.empty(  # noqa: E731
            shape, dtype=torch.float32, device=query.device
        )
        parts, maxima, sums = (
            new(rows, splits, dim),
            new(rows, splits),
            new(rows, splits),
        )
    attend_kernel[(rows, splits)](
        *(query, keys, values, bias, column, parts, maxima, sums),
        *(batch, columns, used, heads, heads // kv_heads, dim**-0.5),
        D=dim,
        PADDED=padded,
        BLOCK=BLOCK,
        SPLITS=splits,
        num_warps=4,
    )
    if splits > 1:
        combine_kernel[(rows,)](
            *(parts, maxima, sums, context),
            D=dim,
            PADDED=padded,
            SPLITS=splits,
            num_warps=2,
        )
    return context


def decode_layer(
    x,
    layer,
    cos,
    sin,
    bias,
    column,
    keys,
    values,
    head_dim,
    epsilon,
    fused=False,
    project=torch_network.project,
):
    """See `torch_network.decode_layer`; `x` may be a pair that is still to be added."""
    x, added = x if isinstance(x, tuple) else (x, torch.zeros_like(x))
    x, normed = add_norm(x, added, layer.attention_norm, epsilon)
    batch = x.shape[0]
    query = project(normed, layer.query)
    if fused:
        kv = layer.key.kernel.shape[0]
        query, key, value = query.split([query.shape[2] - 2 * kv, kv, kv], dim=2)
    else:
        key, value = project(normed, layer.key), project(normed, layer.value)
    heads, kv_heads = query.shape[2] // head_dim, key.shape[2] // head_dim
    rotated = torch.empty(
        (batch, heads, head_dim), dtype=query.dtype, device=query.device
    )
    half = head_dim // 2
    rotate_and_store_kernel[(batch, heads)](
        *(query, key, value, query.stride(0), key.stride(0), cos, sin, rotated),
        *(keys, values, column, batch, keys.shape[1], heads, kv_heads),
        HALF=half,
        PADDED=triton.next_power_of_2(half),
        num_warps=1,
    )
    context = attend(rotated, keys, values, bias, column)
    added = project(context.view(batch, 1, -1), layer.output)
    x, normed = add_norm(x, added, layer.feedforward_norm, epsilon)
    gate = project(normed, layer.gate)
    if fused:
        gate, up = gate.chunk(2, dim=-1)
    else:
        up = project(normed, layer.up)
    width = gate.shape[-1]
    hidden = torch.empty((batch, 1, width), dtype=gate.dtype, device=gate.device)
    silu_kernel[(batch, triton.cdiv(width, 1024))](
        *(gate, up, hidden, gate.stride(0), width), BLOCK=1024, num_warps=4
    )
    return x, project(hidden, layer.down)
