"""One decode step of lightning attention on TPU: states are read, updated and written in place.

Compiled for v5e, v5p, v6e and tpu7x and run by the interpreter; not run on a TPU.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# Heads of a block: rows of q, k and v come in tiles of 8, and 8 states are 512 KiB.
HEADS = 8


def _decode_kernel(slots_ref, active_ref, slopes_ref, q_ref, k_ref, v_ref, state_ref, out_ref,
                   new_ref, *, heads):
    group = pl.program_id(1)
    # An inert row keeps its state: no decay, no update.
    active = active_ref[pl.program_id(0)].astype(jnp.float32)
    q, k, v = (x[...].astype(jnp.float32) for x in (q_ref, k_ref, v_ref))
    q_HN, k_HN = (q * active).T, (k * active).T  # a head's column multiplies rows of its state
    for h in range(heads):
        slope = active * slopes_ref[group * heads + h]
        decay = jnp.exp(jnp.full((1, q.shape[1]), -slope))
        state = decay * state_ref[h] + k_HN[:, h:h + 1] * v[h:h + 1]
        new_ref[h] = state
        out = jnp.sum(q_HN[:, h:h + 1] * state, axis=0, keepdims=True)
        out_ref[h:h + 1] = out.astype(out_ref.dtype)


def decode(q_BNH, k_BNH, v_BNH, slopes_N, states_PNHH, slots_B, active_B=None, *,
           interpret=False):
    """Arguments and results as in `lightning_decode_slots`.

    active_B: int32, 0 for rows that keep their states, which are theirs all the same, and whose
    outputs are zero.
    """
    B, N, H = q_BNH.shape
    active_B = jnp.ones(B, jnp.int32) if active_B is None else active_B.astype(jnp.int32)
    heads = HEADS if N % HEADS == 0 else N
    row = pl.BlockSpec((None, heads, H), lambda b, n, slots, active: (b, n, 0))
    state = pl.BlockSpec((None, heads, H, H), lambda b, n, slots, active: (slots[b], n, 0, 0))
    return pl.pallas_call(
        functools.partial(_decode_kernel, heads=heads),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, N // heads),
            in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), row, row, row, state],
            out_specs=[row, state],
        ),
        out_shape=[jax.ShapeDtypeStruct((B, N, H), q_BNH.dtype),
                   jax.ShapeDtypeStruct(states_PNHH.shape, jnp.float32)],
        input_output_aliases={6: 1},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=5 * B * N * H * H, bytes_accessed=8 * B * N * H * H, transcendentals=0),
        interpret=interpret,
        name="lightning_decode",
    )(slots_B.astype(jnp.int32), active_B, slopes_N, q_BNH, k_BNH, v_BNH, states_PNHH)
