"""The programs of lightning attention in Triton: one block of threads each.

A program owns one head's value columns (or some of them) and walks over chunks of C tokens with the
float32 state in registers. Towards later tokens `S_t = λ S_{t-1} + k_t^T v_t`, `o_t = q_t S_t`;
towards earlier ones (REVERSE) `G_t = E_t + k_t^T v_t`, `o_t = q_t G_t`, `E_{t-1} = λ G_t`.

All exponents are ≤ 0: the decayed mask is never factored into λ^r and λ^-c, which overflows for
fast heads. Offsets into tensors are 64 bits wide; those inside a chunk need 32.
"""

from __future__ import annotations

try:
    import triton.language as tl
    from triton import jit
except ImportError:  # an extra; nothing here is called without it

    def jit(function):
        return function


@jit
def _decay(slope, distance):
    """λ^distance for integer distances, 1 for negative ones."""
    return tl.exp(-slope * tl.maximum(distance, 0).to(tl.float32))


@jit
def _span(lengths, b, part, T, chunks_per_part, C: tl.constexpr, LENGTHS: tl.constexpr):
    """Tokens of the row, the part's first chunk, and how many of its chunks hold tokens."""
    length = T
    if LENGTHS:
        length = tl.minimum(tl.maximum(tl.load(lengths + b), 0), T)
    first = part * chunks_per_part
    count = tl.minimum(tl.maximum(tl.cdiv(length, C) - first, 0), chunks_per_part)
    return length, first, count


@jit
def _rows_of(x, token, width, inside, N: tl.constexpr, H: tl.constexpr, C: tl.constexpr,
             RAGGED: tl.constexpr):
    """Rows of a chunk at `x` [C, width's]; zeros where there is no token."""
    place = x + token.to(tl.int64) * (N * H) + tl.arange(0, C)[:, None] * (N * H) + width[None, :]
    if RAGGED:
        return tl.load(place, mask=inside[:, None], other=0.0)
    return tl.load(place)


@jit
def _updated(state, k, v, entering, stays):
    """The state one chunk on: `entering` [C] decays what comes in, `stays` what is there."""
    v = (v.to(tl.float32) * entering[:, None]).to(v.dtype)
    return tl.dot(tl.trans(k), v, acc=state * stays, input_precision="ieee")


@jit
def lightning_walk(
    q0, k0, v0, q1, k1, v1, slopes, incoming, lengths, samples, edges, T, chunks_per_part,
    out0, out1, outgoing,
    N: tl.constexpr, H: tl.constexpr, C: tl.constexpr, W: tl.constexpr, ROLES: tl.constexpr,
    REVERSE: tl.constexpr, LENGTHS: tl.constexpr, SAMPLES: tl.constexpr, RAGGED: tl.constexpr,
):
    """Outputs [B, T, N, H] of one role or two, and their states after the last part.

    Grid: (N · roles · H / W, parts, B), columns and roles of one head beside each other, so that
    they share loads through L2. q0, k0 and v0 are those of role 0. `incoming` and `outgoing` are
    [roles, B, parts or 1, N, H, H] float32; `samples` [B, T] and `edges` [B, chunks, 2] int32.
    """
    place, part, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    parts, batch = tl.num_programs(1), tl.num_programs(2)
    own = place % (H // W) * W + tl.arange(0, W)
    role = place // (H // W) % ROLES
    n = place // (H // W * ROLES)
    q, k, v, out = q0, k0, v0, out0
    if ROLES == 2:
        if role == 1:
            q, k, v, out = q1, k1, v1, out1
    row, column = tl.arange(0, C), tl.arange(0, H)
    start = (b * T * N + n) * H
    q, k, v, out = q + start, k + start, v + start, out + start
    slope = tl.load(slopes + n)
    length, first, count = _span(lengths, b, part, T, chunks_per_part, C, LENGTHS)

    square = column[:, None] * H + own[None, :]
    state = tl.load(incoming + (((role * batch + b) * parts + part) * N + n) * (H * H) + square)
    ahead = row[None, :] - row[:, None] if REVERSE else row[:, None] - row[None, :]
    mask = tl.where(ahead >= 0, _decay(slope, ahead), 0.0)
    for i in range(0, count):
        chunk = first + (count - 1 - i if REVERSE else i)
        rows = tl.minimum(length - chunk * C, C) if RAGGED else C
        inside = row < rows
        reading = _decay(slope, rows - 1 - row if REVERSE else row + 1)
        entering = _decay(slope, row + 1 if REVERSE else rows - 1 - row)
        stays = tl.exp(-slope * rows)
        if SAMPLES:
            of_row = tl.load(samples + b * T + chunk * C + row, mask=inside, other=-1)
            edge = edges + (b * tl.cdiv(T, C) + chunk) * 2
            source, target = tl.load(edge), tl.load(edge + 1)
            reading = tl.where(of_row == source, reading, 0.0)
            entering = tl.where(of_row == target, entering, 0.0)
            stays = tl.where(source == target, stays, 0.0)
        # Each operand is read just before it is needed: registers are what is scarce.
        q_CH = _rows_of(q, chunk * C, column, inside, N, H, C, RAGGED)
        o_CW = tl.dot(q_CH, state.to(q_CH.dtype), input_precision="ieee") * reading[:, None]
        k_CH = _rows_of(k, chunk * C, column, inside, N, H, C, RAGGED)
        scores = tl.dot(q_CH, tl.trans(k_CH), input_precision="ieee") * mask
        if SAMPLES:
            scores = tl.where(of_row[:, None] == of_row[None, :], scores, 0.0)
        v_CW = _rows_of(v, chunk * C, own, inside, N, H, C, RAGGED)
        o_CW = tl.dot(scores.to(v_CW.dtype), v_CW, acc=o_CW, input_precision="ieee")
        target_CW = out + (chunk * C).to(tl.int64) * (N * H) + row[:, None] * (N * H) + own[None, :]
        if RAGGED:
            tl.store(target_CW, o_CW.to(q_CH.dtype), mask=(chunk * C + row < T)[:, None])
        else:
            tl.store(target_CW, o_CW.to(q_CH.dtype))
        state = _updated(state, k_CH, v_CW, entering, stays)
    if LENGTHS:
        empty = tl.minimum(first + chunks_per_part, tl.cdiv(T, C)) - first - count
        for i in range(0, empty):
            chunk = first + count + i
            target_CW = (out + (chunk * C).to(tl.int64) * (N * H)
                         + row[:, None] * (N * H) + own[None, :])
            tl.store(target_CW, tl.zeros((C, W), out.dtype.element_ty),
                     mask=(chunk * C + row < T)[:, None])
    if part == (0 if REVERSE else parts - 1):
        tl.store(outgoing + ((role * batch + b) * N + n) * (H * H) + square, state)


@jit
def lightning_states(
    k0, v0, k1, v1, slopes, lengths, samples, edges, T, chunks_per_part,
    outgoing,
    N: tl.constexpr, H: tl.constexpr, C: tl.constexpr, W: tl.constexpr, ROLES: tl.constexpr,
    REVERSE: tl.constexpr, LENGTHS: tl.constexpr, SAMPLES: tl.constexpr, RAGGED: tl.constexpr,
):
    """The state that each part makes of an empty one: `outgoing` [roles, B, parts, N, H, H].

    Arguments as of `lightning_walk`. The walk begins where tokens begin to count at the part's end.
    """
    place, part, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    parts, batch = tl.num_programs(1), tl.num_programs(2)
    own = place % (H // W) * W + tl.arange(0, W)
    role = place // (H // W) % ROLES
    n = place // (H // W * ROLES)
    k, v = k0, v0
    if ROLES == 2:
        if role == 1:
            k, v = k1, v1
    row, column = tl.arange(0, C), tl.arange(0, H)
    start = (b * T * N + n) * H
    k, v = k + start, v + start
    slope = tl.load(slopes + n)
    length, first, count = _span(lengths, b, part, T, chunks_per_part, C, LENGTHS)
    # Of tokens that decay by e^-28 (7e-13) before a part's end nothing is left in a float32 sum.
    lasting = tl.minimum(28.0 / tl.maximum(slope, 1e-9), T * 1.0).to(tl.int32)
    # One chunk more for the rounding, one for a last chunk that is not full.
    needed = tl.minimum(count, lasting // C + 2)
    if not REVERSE:
        first += count - needed

    state = tl.zeros((H, W), tl.float32)
    for i in range(0, needed):
        chunk = first + (needed - 1 - i if REVERSE else i)
        rows = tl.minimum(length - chunk * C, C) if RAGGED else C
        inside = row < rows
        k_CH = _rows_of(k, chunk * C, column, inside, N, H, C, RAGGED)
        v_CW = _rows_of(v, chunk * C, own, inside, N, H, C, RAGGED)
        entering = _decay(slope, row + 1 if REVERSE else rows - 1 - row)
        stays = tl.exp(-slope * rows)
        if SAMPLES:
            of_row = tl.load(samples + b * T + chunk * C + row, mask=inside, other=-1)
            edge = edges + (b * tl.cdiv(T, C) + chunk) * 2
            source, target = tl.load(edge), tl.load(edge + 1)
            entering = tl.where(of_row == target, entering, 0.0)
            stays = tl.where(source == target, stays, 0.0)
        state = _updated(state, k_CH, v_CW, entering, stays)
    square = column[:, None] * H + own[None, :]
    tl.store(outgoing + (((role * batch + b) * parts + part) * N + n) * (H * H) + square, state)


@jit
def lightning_step(q, k, v, slopes, slots, states, out, updated,
                   N: tl.constexpr, H: tl.constexpr, W: tl.constexpr):
    """One token of each row: its state in the pool is read and written once, where it lies.

    q, k, v, out: [B, N, H]; slots: [B] int32; `states` and `updated` are the same [P, N, H, H].
    Grid: (N · H / W, B).
    """
    place, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n, column = place // (H // W), tl.arange(0, H)
    own = place % (H // W) * W + tl.arange(0, W)
    slot = tl.load(slots + b).to(tl.int64)
    token = (b * N + n) * H
    square = (slot * N + n) * (H * H) + column[:, None] * H + own[None, :]
    state = tl.load(states + square)
    q_H = tl.load(q + token + column).to(tl.float32)
    k_H = tl.load(k + token + column).to(tl.float32)
    v_W = tl.load(v + token + own).to(tl.float32)
    state = state * tl.exp(-tl.load(slopes + n)) + k_H[:, None] * v_W[None, :]
    tl.store(updated + square, state)
    o_W = tl.sum(q_H[:, None] * state, axis=0)
    tl.store(out + token + own, o_W.to(out.dtype.element_ty))
