"""Lightning attention for TPU, forward: blocks of unrolled chunks, the state in on-chip memory.

Arrays are read as [B, T, N·H], the layout that projections write, so that nothing is transposed
in HBM: q, k and v are read once and the output is written once. Inside a chunk tokens meet through
a decayed causal product; only the state passes between chunks (arXiv 2501.08313 §2.2). All
exponents are ≤ 0.

Compiled for v5e, v5p, v6e and tpu7x and run by the interpreter; not run on a TPU.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.lightning_attention.pallas_tpu_block import (
    NN,
    NT,
    PARAMS,
    TN,
    Blocks,
    Walk,
    dot,
    flat,
    layout,
    scaled,
    scratch,
    specs,
)


def _forward_kernel(
    lengths_ref, slopes_ref, q_ref, k_ref, v_ref, state_ref, *refs, blocks, packed, ragged, saves
):
    refs = list(refs)
    packed = (refs.pop(0), refs.pop(0)) if packed else None
    out_ref, last_ref = refs.pop(0), refs.pop(0)
    saved_ref = refs.pop(0) if saves else None
    carried_ref, *tables = refs
    b, group, t = (pl.program_id(i) for i in range(3))
    walk = Walk(blocks, slopes_ref, group * blocks.heads, tuple(tables), packed)

    @pl.when(t == 0)
    def _():
        carried_ref[...] = state_ref[...]
        walk.write_tables()

    if saves:
        saved_ref[...] = carried_ref[...]

    def one(walk, h, i, state):
        """Output of chunk i of head h is written; the state after it is returned."""
        chunk = walk.chunk(i, h)
        q, k, v = (chunk.load(x) for x in (q_ref, k_ref, v_ref))
        scores = chunk.mask(dot(q, k, NT)).astype(q.dtype)
        out = dot(scores, v, NN) + chunk.read * dot(q, state.astype(q.dtype), NN)
        out_ref[chunk.at] = out.astype(q.dtype)
        return chunk.carry * state + dot(scaled(k, chunk.write), v, TN)

    def body(walk):
        for h in range(blocks.heads):
            carried_ref[h] = walk.fold(functools.partial(one, walk, h), carried_ref[h])

    walk.run(body, lengths_ref[b] - t * blocks.tokens, ragged)

    @pl.when(t == pl.num_programs(2) - 1)
    def _():
        last_ref[...] = carried_ref[...]


def forward(q_BTNH, k_BTNH, v_BTNH, slopes_N, state_BNHH, starts_BT, lengths_B, *,
            blocks: Blocks, interpret=False, saves: bool = False):
    """Returns out [B, T, N, H], the last state and, if `saves`, the states before each block.

    Those are float32 [B, blocks, N, H, H]. Other arguments as in the public function.
    """
    B, T, N, H = q_BTNH.shape
    padding, lengths_B, ragged, extra = layout(q_BTNH, starts_BT, lengths_B, blocks)
    count = (T + padding) // blocks.tokens
    sequence, state, saved, extra_specs = specs(blocks, H, bool(extra))
    inputs = [flat(x, padding) for x in (q_BTNH, k_BTNH, v_BTNH)]
    out_specs = [sequence, state]
    out_shape = [
        jax.ShapeDtypeStruct(inputs[0].shape, q_BTNH.dtype),
        jax.ShapeDtypeStruct((B, N, H, H), jnp.float32),
    ]
    if saves:
        out_specs.append(saved)
        out_shape.append(jax.ShapeDtypeStruct((B, count, N, H, H), jnp.float32))
    out, *states = pl.pallas_call(
        functools.partial(
            _forward_kernel, blocks=blocks, packed=bool(extra), ragged=ragged, saves=saves),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, N // blocks.heads, count),
            in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), sequence, sequence, sequence, state,
                      *extra_specs],
            out_specs=out_specs,
            scratch_shapes=scratch(blocks, H),
        ),
        out_shape=out_shape,
        compiler_params=PARAMS,
        cost_estimate=pl.CostEstimate(
            flops=B * (T + padding) * N * 4 * H * (blocks.chunk + H),
            bytes_accessed=4 * inputs[0].nbytes, transcendentals=0),
        interpret=interpret,
        name="lightning_forward",
    )(lengths_B, slopes_N, *inputs, state_BNHH, *extra)
    # Else XLA changes the layout only behind a conversion to float32 that follows.
    return (jax.lax.optimization_barrier(out[:, :T].reshape(B, T, N, H)), *states)
