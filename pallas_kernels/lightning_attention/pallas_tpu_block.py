"""What the TPU kernels of lightning attention share: blocks of chunks, their decays, the walk.

A grid step takes a block of chunks of one or several heads out of [B, T, N·H]. The chunks are
unrolled: the matrix units keep the order in which products are written down, and only products
that do not wait for each other fill them.
"""

import dataclasses
import pathlib
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import precision, tuning
from pallas_kernels.lightning_attention.segments import segments

LANES = 128
PARAMS = pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=64 << 20)
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


def tuned(tokens: int, num_heads: int) -> Blocks:
    """Blocks for the chip at hand; forward and backward have the same."""
    return Blocks(**tuning.entry(_FILE, "blocks")).fit(tokens, num_heads)


def dot(a, b, dims):
    """A product summed in float32; float32 operands are not rounded to bfloat16."""
    return jax.lax.dot_general(
        a,
        b,
        (dims, ((), ())),
        precision=precision.for_dtype(a.dtype),
        preferred_element_type=jnp.float32,
    )


def scaled(x, decay):
    """x times float32 decays, in x's dtype."""
    return (x.astype(jnp.float32) * decay).astype(x.dtype)


def iota(shape, dim):
    return jax.lax.broadcasted_iota(jnp.int32, shape, dim)


class Chunk:
    """One chunk of one head: its place, its tokens, its decays, cut where samples begin or end.

    at: its place in a block of a sequence. tokens: how many of its tokens are real, None when all
    are. cut: (ends (1, C), first (1, H), last (1, H)) int32 as in `Segments`, None without packed
    rows.
    """

    def __init__(self, at, slope, mask, read, write, tokens=None, cut=None):
        C, H = read.shape
        self.at, self._mask, self._tokens, self._ends = at, mask, tokens, None
        # The exponent as a vector: a TPU's scalar unit has no exp.
        carry = jnp.exp(jnp.full((1, H), -slope) * jnp.float32(C if tokens is None else tokens))
        row = iota((C, H), 0)
        if tokens is not None:
            after = jnp.maximum(tokens - 1 - row, 0)
            write = jnp.exp(-slope * after.astype(jnp.float32))
        if cut is not None:
            self._ends, first, last = cut
            read = jnp.where(row < first, read, 0.0)
            write = jnp.where(row >= last, write, 0.0)
            carry = jnp.where(first == C, carry, 0.0)
        self.read, self.write, self.carry = read, write, carry

    def load(self, ref):
        """Its tokens of a sequence; zeros beyond the row, where anything may lie."""
        x = ref[self.at]
        if self._tokens is None:
            return x
        return jnp.where(iota(x.shape, 0) < self._tokens, x, jnp.zeros_like(x))

    def mask(self, scores):
        """Scores [r, c] decayed, and zero across samples."""
        scores = scores * self._mask
        if self._ends is None:
            return scores
        return jnp.where(iota(scores.shape, 0) < self._ends, scores, 0.0)


@dataclass(frozen=True)
class Walk:
    """The chunks of one block, in turn.

    slopes: ref of all heads' slopes, `head` the block's first. tables: refs of each head's decays,
    (heads, C, C) and twice (heads, C, H). packed: refs (ends [1, blk], bounds [chunks, 2H]) or
    None. left: the row's tokens from the block's first on; None where the block is full.
    """

    blocks: Blocks
    slopes: object
    head: object
    tables: tuple
    packed: tuple | None
    left: object = None

    def write_tables(self) -> None:
        """Fills the tables: λ^(r-c) below the diagonal, λ^(r+1) and λ^(C-1-c) along lanes."""
        for h in range(self.blocks.heads):
            slope = self.slopes[self.head + h]
            mask_ref, read_ref, write_ref = (table.at[h] for table in self.tables)
            C, H = read_ref.shape
            distance = iota((C, C), 0) - iota((C, C), 1)
            decay = jnp.exp(-slope * jnp.maximum(distance, 0).astype(jnp.float32))
            mask_ref[...] = jnp.where(distance >= 0, decay, 0.0)
            row = iota((C, H), 0).astype(jnp.float32)
            read_ref[...] = jnp.exp(-slope * (row + 1))
            write_ref[...] = jnp.exp(-slope * (C - 1 - row))

    def chunk(self, i, h: int) -> Chunk:
        """Chunk i of the block's head h."""
        mask, read, write = (table[h] for table in self.tables)
        C, H = read.shape
        start = i * C if isinstance(i, int) else pl.multiple_of(i * C, C)
        cut = None
        if self.packed is not None:
            ends_ref, bounds_ref = self.packed
            bounds = bounds_ref[pl.ds(i, 1), :]
            cut = ends_ref[:, pl.ds(start, C)], bounds[:, :H], bounds[:, H:]
        return Chunk(
            (pl.ds(start, C), pl.ds(h * H, H)), self.slopes[self.head + h], mask, read, write,
            None if self.left is None else jnp.clip(self.left - i * C, 0, C), cut)

    def fold(self, step, carry, reverse=False):
        """Folds carry = step(i, carry) over the chunks: unrolled, or a loop in a cut block."""
        count = self.blocks.chunks

        def one(j, carry):
            return step(count - 1 - j if reverse else j, carry)

        if self.left is not None:
            return jax.lax.fori_loop(0, count, one, carry)
        for j in range(count):
            carry = one(j, carry)
        return carry

    def next(self, i):
        """The chunk after chunk i; the last one's is itself."""
        last = self.blocks.chunks - 1
        return min(i + 1, last) if isinstance(i, int) else jnp.minimum(i + 1, last)

    def run(self, body, left, ragged: bool) -> None:
        """Calls body(walk) for a full block, and for one that its row ends in if `ragged`."""
        if not ragged:
            body(self)
            return
        pl.when(left >= self.blocks.tokens)(lambda: body(self))
        pl.when(left < self.blocks.tokens)(lambda: body(dataclasses.replace(self, left=left)))


def layout(q_BTNH, starts_BT, lengths_B, blocks: Blocks):
    """Returns (padding, lengths int32 [B], whether they matter, inputs of packed rows).

    Inputs are those of `Walk`: ends [B, 1, T'] and bounds [B, T' / C, 2H], T' padded.
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
    """Block specs of (a sequence, a state, a state of each block, the inputs of packed rows)."""
    sequence = pl.BlockSpec(
        (None, blocks.tokens, blocks.heads * H), lambda b, n, t, *_: (b, order(t), n))
    state = pl.BlockSpec((None, blocks.heads, H, H), lambda b, n, t, *_: (b, n, 0, 0))
    saved = pl.BlockSpec(
        (None, None, blocks.heads, H, H), lambda b, n, t, *_: (b, order(t), n, 0, 0))
    extra = [
        pl.BlockSpec((None, 1, blocks.tokens), lambda b, n, t, *_: (b, 0, order(t))),
        pl.BlockSpec((None, blocks.chunks, 2 * H), lambda b, n, t, *_: (b, order(t), 0)),
    ] if packed else []
    return sequence, state, saved, extra


def scratch(blocks: Blocks, H: int) -> list:
    """The state carried from block to block and the tables of decays, float32 per head."""
    C = blocks.chunk
    return [pltpu.VMEM((blocks.heads, *shape), jnp.float32)
            for shape in ((H, H), (C, C), (C, H), (C, H))]


def flat(x_BTNH, padding: int):
    """[B, T, N, H] as [B, T + padding, N·H]."""
    x = x_BTNH.reshape(*x_BTNH.shape[:2], -1)
    return jnp.pad(x, ((0, 0), (0, padding), (0, 0))) if padding else x
