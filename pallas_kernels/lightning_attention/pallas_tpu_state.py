"""The state after a piece of a sequence on TPU: a grid of as many steps as blocks still matter.

Each head has its own number of blocks, told by data; a list of them is made before the kernel and
read by its scalar unit, and the grid is as long as the list is. A block's tokens are weighted by
their decay to the row's end, so that blocks only add up.

Compiled for v5e, v5p, v6e and tpu7x and run by the interpreter; not run on a TPU.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.lightning_attention.pallas_tpu_block import LANES, TN, dot, flat, iota
from pallas_kernels.lightning_attention.state import windows

BLOCK = 1024  # tokens
# Entries of the list of blocks, 4 bytes each in the scalar unit's memory.
MOST_STEPS = 1 << 15


def _kernel(steps_ref, first_ref, end_ref, slopes_ref, k_ref, v_ref, out_ref,
            *, N, blocks, reverse):
    i = pl.program_id(0)
    pair, block = jax.lax.div(steps_ref[i], blocks), jax.lax.rem(steps_ref[i], blocks)
    b, n = jax.lax.div(pair, N), jax.lax.rem(pair, N)

    @pl.when((i == 0) | (jax.lax.div(steps_ref[jnp.maximum(i - 1, 0)], blocks) != pair))
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)

    time = block * k_ref.shape[0] + iota(k_ref.shape, 0)
    inside = (time >= first_ref[b]) & (time < end_ref[b])
    steps = time + 1 if reverse else jnp.maximum(end_ref[b] - 1 - time, 0)
    decay = jnp.exp(-slopes_ref[n] * steps.astype(jnp.float32))
    # What lies beyond a row may be anything.
    k = jnp.where(inside, k_ref[...].astype(jnp.float32) * decay, 0.0).astype(k_ref.dtype)
    v = jnp.where(inside, v_ref[...], jnp.zeros_like(v_ref))
    out_ref[...] += dot(k, v, TN)


def state(k_BTNH, v_BTNH, slopes_N, first_B, end_B, reverse, *, interpret=None):
    """The state [B, N, H, H] float32 of the tokens from `first_B` to `end_B`; see `state.py`.

    Raises ValueError on a GPU and for heads that are no multiple of 128.
    """
    B, T, N, H = k_BTNH.shape
    platform = dispatch.platform()
    if platform == "gpu" or H % LANES:
        raise ValueError(
            "lightning_state's 'pallas_tpu' runs on TPU, and interpreted on CPU, for heads of a "
            f"multiple of 128; this is a {platform} with heads of {H}. Pass 'xla' or None.")
    interpret = platform == "cpu" if interpret is None else interpret
    size = min(BLOCK, -(-T // LANES) * LANES)
    while B * N * -(-T // size) > MOST_STEPS:
        size *= 2
    blocks = -(-T // size)
    begin_BN, stop_BN = windows(slopes_N, first_B, end_B, T, reverse)
    at_P = jnp.minimum(begin_BN.reshape(-1) // size, blocks - 1)
    # Every state is written, if only with zeros.
    count_P = jnp.maximum(-(-stop_BN.reshape(-1) // size) - at_P, 1)
    last_P = jnp.cumsum(count_P)
    step_S = jnp.arange(B * N * blocks, dtype=jnp.int32)
    pair_S = jnp.minimum(jnp.searchsorted(last_P, step_S, side="right"), B * N - 1)
    block_S = at_P[pair_S] + step_S - (last_P - count_P)[pair_S]
    steps_S = (pair_S * blocks + jnp.clip(block_S, 0, blocks - 1)).astype(jnp.int32)

    def place(i, steps, *_):
        pair = jax.lax.div(steps[i], blocks)
        return jax.lax.div(pair, N), jax.lax.rem(steps[i], blocks), jax.lax.rem(pair, N)

    sequence = pl.BlockSpec((None, size, H), place)
    inputs = [flat(x, 0) for x in (k_BTNH, v_BTNH)]
    out_PHH = pl.pallas_call(
        functools.partial(_kernel, N=N, blocks=blocks, reverse=reverse),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(last_P[-1],),
            in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), sequence, sequence],
            out_specs=pl.BlockSpec(
                (None, H, H), lambda i, steps, *_: (jax.lax.div(steps[i], blocks), 0, 0)),
        ),
        out_shape=jax.ShapeDtypeStruct((B * N, H, H), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        # As if every token mattered: how many do is not known when a program is compiled.
        cost_estimate=pl.CostEstimate(
            flops=2 * B * T * N * H * H, bytes_accessed=2 * inputs[0].nbytes, transcendentals=0),
        interpret=interpret,
        name="lightning_state",
    )(steps_S, first_B, end_B, slopes_N, *inputs)
    return out_PHH.reshape(B, N, H, H)
