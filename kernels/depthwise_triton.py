"""Triton kernels of the depthwise convolution; channels lie side by side, whatever heads they belong to.

Every warp takes a run of channels and a few columns of the grid, and walks down the rows. What it carries from row to
row stays in registers: the sums of the rows in work, and the K * K taps of its channels. That is why a thread has two
channels only (`CHANNELS` is 64 to a warp) and why columns are unrolled: each value is read (COLUMNS + K - 1) / COLUMNS
times and converted as often, not K * K times, and K * K multiplications an output are nearly all that is left to do.
Tensors are `[TILES, CHANNELS]`, one tile of COLUMNS columns to a warp.
"""

# mypy: ignore-errors
import triton
import triton.language as tl


@triton.jit
def _long(x):
    """An argument of value 1 comes as a constant, which has no `.to`."""
    return tl.full((), 0, tl.int64) + x


@triton.jit
def _places(c, dim, head_stride, FLAT: tl.constexpr, VECTOR: tl.constexpr):
    """Offsets of channels c in `[.., H, D]`; runs of VECTOR of them lie side by side."""
    places = c
    if not FLAT:
        places = (c // dim).to(tl.int64) * head_stride + c % dim
        places = tl.max_contiguous(tl.multiple_of(places, (1, VECTOR)), (1, VECTOR))
    return places


@triton.jit
def _on_grid(x, width, exist, COUNT: tl.constexpr):
    masks = ()
    for i in tl.static_range(COUNT):
        masks = masks + (exist & (x + i >= 0) & (x + i < width),)
    return masks


@triton.jit
def _load(pointer, step, masks, row, COUNT: tl.constexpr):
    """COUNT tokens side by side of a row that may not exist."""
    values = ()
    for i in tl.static_range(COUNT):
        values = values + (tl.load(pointer + i * step, mask=masks[i] & row, other=0.0),)
    return values


@triton.jit
def _wide(values, COUNT: tl.constexpr):
    wide = ()
    for i in tl.static_range(COUNT):
        wide = wide + (values[i].to(tl.float32),)
    return wide


@triton.jit
def _taps(weight, c, channels, weight_channels, K: tl.constexpr, PADDED: tl.constexpr, CHANNELS: tl.constexpr):
    """The K * K taps of channels c, `[1, CHANNELS]` each: read as they lie in memory, then turned in one exchange."""
    t = tl.arange(0, PADDED)[None, :]
    tile = tl.load(
        weight + (c % weight_channels)[:, None] * (K * K) + t, mask=(c < channels)[:, None] & (t < K * K), other=0.0
    )
    parts = (tile,)
    for level in tl.static_range(8):
        if 2**level < PADDED:
            halves = ()
            for i in tl.static_range(2**level):
                pairs = tl.permute(tl.reshape(parts[i], (CHANNELS, 2, PADDED // 2 ** (level + 1))), (0, 2, 1))
                low, high = tl.split(pairs)
                halves = halves + (low, high)
            parts = halves
    taps = ()
    for i in tl.static_range(K * K):
        taps = taps + (tl.reshape(parts[i], (1, CHANNELS)).to(tl.float32),)
    return taps


@triton.jit
def _finish(to, step, sums, plus, masks, row, COUNT: tl.constexpr, ADD: tl.constexpr):
    """One row of COUNT outputs."""
    for i in tl.static_range(COUNT):
        total = sums[i]
        if ADD:
            total += plus[i].to(tl.float32)
        tl.store(to + i * step, total.to(to.dtype.element_ty), mask=masks[i] & row)


@triton.jit
def forward_kernel(
    v, weight, bias, add, out, height, width, rows, blocks, frames, channels, dim, weight_channels,
    v_batch, v_head, add_batch, add_head, out_batch,
    V_TOKEN: tl.constexpr, ADD_TOKEN: tl.constexpr, OUT_TOKEN: tl.constexpr, AHEAD: tl.constexpr,
    K: tl.constexpr, PADDED: tl.constexpr, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
    WHOLE: tl.constexpr, FLAT: tl.constexpr, ADD_FLAT: tl.constexpr, VECTOR: tl.constexpr,
    FLIP: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """`rows` rows of TILES * COLUMNS columns of a frame. FLIP turns the taps around: the gradient of v."""
    R: tl.constexpr = K // 2
    WIDE: tl.constexpr = COLUMNS + K - 1
    block, tile = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    line = block * CHANNELS + tl.arange(0, CHANNELS)
    taps = _taps(weight, line, channels, weight_channels, K, PADDED, CHANNELS)
    c, x = line[None, :], (tile * TILES + tl.arange(0, TILES)[:, None]) * COLUMNS
    exist = (x < width) if WHOLE else (x < width) & (c < channels)
    start = tl.zeros((TILES, CHANNELS), tl.float32)
    if BIAS:
        start += tl.load(bias + c % weight_channels + x * 0, mask=exist, other=0.0).to(tl.float32)
    seen, made = _on_grid(x - R, width, exist, WIDE), _on_grid(x, width, exist, COLUMNS)

    first = tl.program_id(1) * rows
    last = tl.minimum(first + rows, height)
    batch, frame = (tl.program_id(2) // frames).to(tl.int64), tl.program_id(2) % frames
    origin = frame.to(tl.int64) * height + first
    row = v + batch * v_batch + ((origin - R) * width + x - R) * V_TOKEN + _places(c, dim, v_head, FLAT, VECTOR)
    to = out + batch * out_batch + ((origin - 2 * R) * width + x) * OUT_TOKEN + c
    v_row, out_row = _long(width) * V_TOKEN, _long(width) * OUT_TOKEN
    bottom = tl.minimum(last + R, height)
    if ADD:
        more = add + batch * add_batch + ((origin - 2 * R) * width + x) * ADD_TOKEN
        more = more + _places(c, dim, add_head, ADD_FLAT, VECTOR)
        add_row = _long(width) * ADD_TOKEN

    # AHEAD rows are on their way while one is worked on; a row past the last, or off the grid, is read as zeros
    coming, plus = (), ()
    for u in tl.static_range(AHEAD):
        coming = coming + _load(row, V_TOKEN, seen, (first - R + u >= 0) & (first - R + u < height), WIDE)
        plus = plus + (_load(more, ADD_TOKEN, made, u >= 2 * R, COLUMNS) if ADD else made)
        row += v_row
        if ADD:
            more += add_row
    sums = ()  # of output rows y - R ... y + R - 1, that row y and those after it will be added to
    for _ in tl.static_range((K - 1) * COLUMNS):
        sums = sums + (start,)
    for above in range(first - R, last + R, AHEAD):
        later, more_later = (), ()
        for u in tl.static_range(AHEAD):
            y = above + u
            values = _wide(coming[u * WIDE : (u + 1) * WIDE], WIDE)
            later = later + _load(row, V_TOKEN, seen, (y + AHEAD >= 0) & (y + AHEAD < bottom), WIDE)
            row += v_row
            after = ()
            for i in tl.static_range(K):
                for j in tl.static_range(COLUMNS):
                    total = sums[i * COLUMNS + j] if i < K - 1 else start
                    for t in tl.static_range(K):
                        total += values[j + t] * taps[(i * K + K - 1 - t) if FLIP else ((K - 1 - i) * K + t)]
                    after = after + (total,)
            done = (y - R >= first) & (y - R < last)
            _finish(to, OUT_TOKEN, after, plus[u * COLUMNS : (u + 1) * COLUMNS], made, done, COLUMNS, ADD)
            to += out_row
            if ADD:
                coming_done = (y + AHEAD - R >= first) & (y + AHEAD - R < last)
                more_later = more_later + _load(more, ADD_TOKEN, made, coming_done, COLUMNS)
                more += add_row
            else:
                more_later = more_later + made
            sums = after[COLUMNS:]
        coming, plus = later, more_later


@triton.jit
def weight_kernel(
    v, grad, partial, height, width, rows, chunks, tiles, units, share, frames, channels, dim,
    v_batch, v_token, v_head, grad_batch, grad_token, grad_head,
    K: tl.constexpr, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
    WHOLE: tl.constexpr, FLAT: tl.constexpr, GRAD_FLAT: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """`partial` `[parts, K * K + 1, C]`: gradients of the taps and the bias from `share` units, each `rows` rows of
    TILES * COLUMNS columns. A row of v meets the K rows of the output's gradient around it, kept in registers."""
    R: tl.constexpr = K // 2
    WIDE: tl.constexpr = COLUMNS + K - 1
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    v_row, grad_row = _long(width) * v_token, _long(width) * grad_token
    zero = tl.zeros((TILES, CHANNELS), tl.float32)
    sums = ()
    for _ in tl.static_range(K * K + 1):
        sums = sums + (zero,)
    begin = tl.program_id(1) * share
    for unit in range(begin, tl.minimum(begin + share, units)):
        x = (unit % tiles * TILES + tl.arange(0, TILES)[:, None]) * COLUMNS
        exist = (x < width) if WHOLE else (x < width) & (c < channels)
        seen, made = _on_grid(x - R, width, exist, WIDE), _on_grid(x, width, exist, COLUMNS)
        first = unit // tiles % chunks * rows
        last = tl.minimum(first + rows, height)
        image = unit // (tiles * chunks)
        batch, origin = (image // frames).to(tl.int64), (image % frames).to(tl.int64) * height
        row = v + batch * v_batch + ((origin + first) * width + x - R) * v_token
        row = row + _places(c, dim, v_head, FLAT, VECTOR)
        near = grad + batch * grad_batch + ((origin + first) * width + x) * grad_token
        near = near + _places(c, dim, grad_head, GRAD_FLAT, VECTOR)
        window = ()
        for i in tl.static_range(2 * R):
            y = first - R + i
            inside = (y >= 0) & (y < height)
            for j in tl.static_range(COLUMNS):
                at = near + (i - R) * grad_row + j * grad_token
                window = window + (tl.load(at, mask=made[j] & inside, other=0.0).to(tl.float32),)
        near += R * grad_row
        coming = _load(row, v_token, seen, True, WIDE)
        below = ()
        for j in tl.static_range(COLUMNS):
            below = below + (tl.load(near + j * grad_token, mask=made[j] & (first + R < height), other=0.0),)
        for y in range(first, last):
            values = _wide(coming, WIDE)
            window = window + _wide(below, COLUMNS)
            row += tl.where(y + 1 < last, v_row, 0)
            coming = _load(row, v_token, seen, True, WIDE)
            near += grad_row
            below = ()
            for j in tl.static_range(COLUMNS):
                below = below + (tl.load(near + j * grad_token, mask=made[j] & (y + 1 + R < height), other=0.0),)
            after = ()
            for t in tl.static_range(K * K):
                total = sums[t]
                for j in tl.static_range(COLUMNS):
                    total += window[(K - 1 - t // K) * COLUMNS + j] * values[j + t % K]
                after = after + (total,)
            total = sums[K * K]
            for j in tl.static_range(COLUMNS):
                total += window[R * COLUMNS + j]
            sums = after + (total,)
            window = window[COLUMNS:]
    to = partial + tl.program_id(1).to(tl.int64) * (K * K + 1) * channels
    line = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    for t in tl.static_range(K * K + 1):
        tl.store(to + t * channels + line, tl.sum(sums[t], axis=0), mask=line < channels)


@triton.jit
def sum_kernel(
    partial, weight, bias, parts, copies, channels, weight_channels,
    TAPS: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Adds up the parts, and the heads that share a weight, in one fixed order."""
    t = tl.program_id(1)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in range(0, parts * copies, ROWS):
        r = start + tl.arange(0, ROWS)[:, None]
        at = ((r // copies) * (TAPS + 1) + t).to(tl.int64) * channels + (r % copies) * weight_channels + c
        total += tl.load(partial + at, mask=(r < parts * copies) & (c < weight_channels), other=0.0)
    summed = tl.sum(total, axis=0)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    if t < TAPS:
        tl.store(weight + c * TAPS + t, summed.to(weight.dtype.element_ty), mask=c < weight_channels)
    elif BIAS:
        tl.store(bias + c, summed.to(bias.dtype.element_ty), mask=c < weight_channels)
