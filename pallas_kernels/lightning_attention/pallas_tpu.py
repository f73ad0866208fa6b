"""Lightning attention for TPU, forward: blocks of unrolled chunks, the state in on-chip memory.

Arrays are read as [B, T, N·H], the layout that projections write, so that nothing is transposed
in HBM: q, k and v are read once and the output is written once. A grid step takes a block of
chunks of one or several heads; the chunks are unrolled, because one chunk's products depend on
each other and only independent ones fill the matrix units. Inside a chunk tokens meet through a
decayed causal product; only the state passes between chunks (arXiv 2501.08313 §2.2). All
exponents are ≤ 0.

Compiled for v5e, v5p, v6e and tpu7x and run by the interpreter; not run on a TPU.
"""

import functools
import pathlib
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import precision, tuning
from pallas_kernels.lightning_attention.segments import segments

LANES = 128
VMEM_BYTES = 64 << 20
NN, NT, TN = (((a,), (b,)) for a, b in ((1, 0), (1, 1), (0, 0)))
_FILE = pathlib.Path(__file__).with_name("blocks.json")


@dataclass(frozen=True)
class Blocks:
    """Tokens of a chunk, chunks of a block and heads of a block."""

    chunk: int
    chunks: int
    heads: int = 1

    def fit(self, tokens: int, num_heads: int) -> "Blocks":
        """The same for a short row or few heads: no longer than needed, heads in whole blocks."""
        chunk = min(self.chunk, -(-tokens // LANES) * LANES)
        heads = max(n for n in range(1, self.heads + 1) if num_heads % n == 0)
        return Blocks(chunk, min(self.chunks, -(-tokens // chunk)), heads)

    @property
    def tokens(self) -> int:
        return self.chunk * self.chunks


def tuned(kernel: str, tokens: int, num_heads: int) -> Blocks:
    """Blocks of "forward" or "backward" for the chip at hand."""
    return Blocks(**tuning.entry(_FILE, kernel)).fit(tokens, num_heads)


def dot(a, b, dims):
    """A product summed in float32; float32 operands are not rounded to bfloat16."""
    return jax.lax.dot_general(
        a,
        b,
        (dims, ((), ())),
        precision=precision.for_dtype(a.dtype),
        preferred_element_type=jnp.float32,
    )


def iota(shape, dim):
    return jax.lax.broadcasted_iota(jnp.int32, shape, dim)


def write_decays(slope, mask_ref, read_ref, write_ref, C: int, H: int) -> None:
    """Fills one head's tables: λ^(r-c) below the diagonal, λ^(r+1) and λ^(C-1-c) along lanes."""
    distance = iota((C, C), 0) - iota((C, C), 1)
    decay = jnp.exp(-slope * jnp.maximum(distance, 0).astype(jnp.float32))
    mask_ref[...] = jnp.where(distance >= 0, decay, 0.0)
    row = iota((C, H), 0).astype(jnp.float32)
    read_ref[...] = jnp.exp(-slope * (row + 1))
    write_ref[...] = jnp.exp(-slope * (C - 1 - row))


class Chunk:
    """Decays of one chunk: constant tables, cut where samples begin or the row ends.

    ends (1, C), first and last (1, H) int32 as in `Segments`, None without packed rows. tokens:
    how many of the chunk's tokens are real, None when all are.
    """

    def __init__(self, slope, mask, read, write, ends=None, first=None, last=None, tokens=None):
        C, H = read.shape
        self._mask, self._ends = mask, ends
        real = C if tokens is None else tokens
        # The exponent as a vector: a TPU's scalar unit has no exp.
        carry = jnp.exp(jnp.full((1, H), -slope) * jnp.float32(real))
        if tokens is not None:
            row = iota((C, H), 0)
            after = (tokens - 1 - row).astype(jnp.float32)
            write = jnp.where(after >= 0, jnp.exp(-slope * jnp.maximum(after, 0)), 0.0)
            read = jnp.where(row < tokens, read, 0.0)
        if ends is not None:
            row = iota((C, H), 0)
            read = jnp.where(row < first, read, 0.0)
            write = jnp.where(row >= last, write, 0.0)
            carry = jnp.where(first == C, carry, 0.0)
        self.read, self.write, self.carry = read, write, carry

    def mask(self, scores):
        """Scores [r, c] decayed, and zero across samples."""
        scores = scores * self._mask
        if self._ends is None:
            return scores
        return jnp.where(iota(scores.shape, 0) < self._ends, scores, 0.0)


def chunk_at(i, tables, slope, packed, tokens, C, H):
    """The `Chunk` i of a block; `packed` are refs (ends [1, blk], bounds [chunks, 2H]) or None."""
    cut = ()
    if packed is not None:
        ends_ref, bounds_ref = packed
        bounds = bounds_ref[pl.ds(i, 1), :]
        cut = ends_ref[:, pl.ds(pl.multiple_of(i * C, C), C)], bounds[:, :H], bounds[:, H:]
    return Chunk(slope, *tables, *(cut or (None,) * 3), tokens=tokens)


def _forward_kernel(
    lengths_ref, slopes_ref, q_ref, k_ref, v_ref, state_ref, *refs, blocks, H, packed, ragged, saves
):
    refs = list(refs)
    packed = (refs.pop(0), refs.pop(0)) if packed else None
    out_ref, last_ref = refs.pop(0), refs.pop(0)
    saved_ref = refs.pop(0) if saves else None
    carried_ref, mask_ref, read_ref, write_ref = refs
    b, group, t = (pl.program_id(i) for i in range(3))
    C, dtype = blocks.chunk, q_ref.dtype

    @pl.when(t == 0)
    def _():
        carried_ref[...] = state_ref[...]
        for h in range(blocks.heads):
            slope = slopes_ref[group * blocks.heads + h]
            write_decays(slope, mask_ref.at[h], read_ref.at[h], write_ref.at[h], C, H)

    if saves:
        saved_ref[...] = carried_ref[...]

    def one(i, h, state, tokens=None):
        """Output of chunk i of head h is written; the state after it is returned."""
        slope = slopes_ref[group * blocks.heads + h]
        tables = mask_ref[h], read_ref[h], write_ref[h]
        chunk = chunk_at(i, tables, slope, packed, tokens, C, H)
        start = i * C if isinstance(i, int) else pl.multiple_of(i * C, C)
        at = (pl.ds(start, C), pl.ds(h * H, H))
        q, k, v = (x[at] for x in (q_ref, k_ref, v_ref))
        if tokens is not None:  # what lies beyond a row may be anything
            real = iota((C, H), 0) < tokens
            k, v = (jnp.where(real, x, jnp.zeros_like(x)) for x in (k, v))
        scores = chunk.mask(dot(q, k, NT)).astype(dtype)
        out = dot(scores, v, NN) + chunk.read * dot(q, state.astype(dtype), NN)
        if tokens is not None:
            out = jnp.where(real, out, 0.0)
        out_ref[at] = out.astype(dtype)
        written = (k.astype(jnp.float32) * chunk.write).astype(dtype)
        return chunk.carry * state + dot(written, v, TN)

    def whole():
        for h in range(blocks.heads):
            state = carried_ref[h]
            for i in range(blocks.chunks):
                state = one(i, h, state)
            carried_ref[h] = state

    if not ragged:
        whole()
    else:
        left = lengths_ref[b] - t * blocks.tokens
        pl.when(left >= blocks.tokens)(whole)

        @pl.when(left < blocks.tokens)
        def _():
            for h in range(blocks.heads):
                def step(i, state, h=h):
                    return one(i, h, state, jnp.clip(left - i * C, 0, C))
                carried_ref[h] = jax.lax.fori_loop(0, blocks.chunks, step, carried_ref[h])

    @pl.when(t == pl.num_programs(2) - 1)
    def _():
        last_ref[...] = carried_ref[...]


def layout(q_BTNH, starts_BT, lengths_B, blocks: Blocks):
    """Returns (padding, lengths int32 [B], whether they matter, inputs and specs of packed rows).

    Inputs are those of `chunk_at`: ends [B, 1, T'] and bounds [B, T' / C, 2H], T' padded.
    """
    B, T, _, H = q_BTNH.shape
    padding = -T % blocks.tokens
    ragged = lengths_B is not None or padding > 0
    if lengths_B is None:
        lengths_B = jnp.full((B,), T, jnp.int32)
    inputs = []
    if starts_BT is not None:
        starts_BT = jnp.pad(starts_BT, ((0, 0), (0, padding)))
        cut = segments(starts_BT, lengths_B, blocks.chunk)
        first, last = (
            jnp.broadcast_to(x[..., None], (*x.shape, H)) for x in (cut.first_Bc, cut.last_Bc))
        inputs = [cut.ends_BT[:, None], jnp.concatenate([first, last], axis=-1)]
    return padding, lengths_B.astype(jnp.int32), ragged, inputs


def specs(blocks: Blocks, H: int, packed: bool, order=lambda t: t):
    """Block specs of (a sequence, a state, the inputs of packed rows)."""
    sequence = pl.BlockSpec(
        (None, blocks.tokens, blocks.heads * H), lambda b, n, t, *_: (b, order(t), n))
    state = pl.BlockSpec((None, blocks.heads, H, H), lambda b, n, t, *_: (b, n, 0, 0))
    extra = [
        pl.BlockSpec((None, 1, blocks.tokens), lambda b, n, t, *_: (b, 0, order(t))),
        pl.BlockSpec((None, blocks.chunks, 2 * H), lambda b, n, t, *_: (b, order(t), 0)),
    ] if packed else []
    return sequence, state, extra


def flat(x_BTNH, padding: int):
    """[B, T, N, H] as [B, T + padding, N·H]."""
    x = x_BTNH.reshape(*x_BTNH.shape[:2], -1)
    return jnp.pad(x, ((0, 0), (0, padding), (0, 0))) if padding else x


def forward(q_BTNH, k_BTNH, v_BTNH, slopes_N, state_BNHH, starts_BT, lengths_B, *,
            blocks: Blocks, interpret=False, saves: bool = False):
    """Returns out [B, T, N, H], the last state and, if `saves`, the states before each block.

    Those are float32 [B, blocks, N, H, H]. Other arguments as in the public function.
    """
    B, T, N, H = q_BTNH.shape
    padding, lengths_B, ragged, extra = layout(q_BTNH, starts_BT, lengths_B, blocks)
    count = (T + padding) // blocks.tokens
    sequence, state, extra_specs = specs(blocks, H, bool(extra))
    inputs = [flat(x, padding) for x in (q_BTNH, k_BTNH, v_BTNH)]
    out_specs = [sequence, state]
    out_shape = [
        jax.ShapeDtypeStruct(inputs[0].shape, q_BTNH.dtype),
        jax.ShapeDtypeStruct((B, N, H, H), jnp.float32),
    ]
    if saves:
        out_specs.append(pl.BlockSpec(
            (None, None, blocks.heads, H, H), lambda b, n, t, *_: (b, t, n, 0, 0)))
        out_shape.append(jax.ShapeDtypeStruct((B, count, N, H, H), jnp.float32))
    C, heads, f32 = blocks.chunk, blocks.heads, jnp.float32
    out, *states = pl.pallas_call(
        functools.partial(_forward_kernel, blocks=blocks, H=H, packed=bool(extra), ragged=ragged,
                          saves=saves),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, N // heads, count),
            in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), sequence, sequence, sequence, state,
                      *extra_specs],
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM((heads, *shape), f32)
                            for shape in ((H, H), (C, C), (C, H), (C, H))],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_BYTES),
        cost_estimate=pl.CostEstimate(
            flops=B * (T + padding) * N * 4 * H * (C + H),
            bytes_accessed=4 * inputs[0].nbytes, transcendentals=0),
        interpret=interpret,
        name="lightning_forward",
    )(lengths_B, slopes_N, *inputs, state_BNHH, *extra)
    # Else XLA changes the layout only behind a conversion to float32 that follows.
    return (jax.lax.optimization_barrier(out[:, :T].reshape(B, T, N, H)), *states)
