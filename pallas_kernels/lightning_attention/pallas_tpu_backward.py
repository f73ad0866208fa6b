"""Lightning attention for TPU, backward: one pass from the last block to the first.

With D the decayed causal mask, A = D ∘ QKᵀ, P = D ∘ dO Vᵀ, S the state before a chunk and R the
gradient of the state after it (arXiv 2501.08313 §2.2, differentiated):

    dQ = P K + λ^(r+1) dO Sᵀ       dK = Pᵀ Q + λ^(C-1-c) V Rᵀ       dV = Aᵀ dO + λ^(C-1-c) K R

S of each block was saved by the forward pass (1/8 of the bytes of q at 2,048 tokens a block); S
and R of its chunks are made first, so that q, k, v and dO are read once for all three gradients.
Then chunks depend on each other no more, and A and P of one are made while the products of the
chunk before wait for nothing: they fill the matrix units, which keep the order written here.

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


def _backward_kernel(
    lengths_ref, slopes_ref, q_ref, k_ref, v_ref, dout_ref, saved_ref, dlast_ref, *refs,
    blocks, packed, ragged
):
    refs = list(refs)
    packed = (refs.pop(0), refs.pop(0)) if packed else None
    dq_ref, dk_ref, dv_ref, dfirst_ref, *refs = refs
    carried_ref, *tables, before_ref, after_ref = refs
    b, group, step = (pl.program_id(i) for i in range(3))
    t = pl.num_programs(2) - 1 - step
    dtype = q_ref.dtype
    walk = Walk(blocks, slopes_ref, group * blocks.heads, tuple(tables), packed)

    @pl.when(step == 0)
    def _():
        carried_ref[...] = dlast_ref[...]
        walk.write_tables()

    def states(walk, h, i, state):
        """The state before chunk i is kept; the one after it is returned."""
        chunk = walk.chunk(i, h)
        before_ref[i] = state.astype(dtype)
        k, v = chunk.load(k_ref), chunk.load(v_ref)
        return chunk.carry * state + dot(scaled(k, chunk.write), v, TN)

    def dstates(walk, h, i, dstate):
        """The gradient of the state after chunk i is kept; that of the one before is returned."""
        chunk = walk.chunk(i, h)
        after_ref[i] = dstate.astype(dtype)
        q, dout = chunk.load(q_ref), chunk.load(dout_ref)
        return chunk.carry * dstate + dot(q, scaled(dout, chunk.read), TN)

    def scores(walk, h, i):
        """A and P of chunk i."""
        chunk = walk.chunk(i, h)
        q, k, v, dout = (chunk.load(x) for x in (q_ref, k_ref, v_ref, dout_ref))
        return tuple(chunk.mask(x).astype(dtype) for x in (dot(q, k, NT), dot(dout, v, NT)))

    def gradients(walk, h, i, own):
        """Gradients of chunk i, whose A and P are `own`, are written; the next one's returned."""
        following = scores(walk, h, walk.next(i))
        A, P = own
        chunk = walk.chunk(i, h)
        q, k, v, dout = (chunk.load(x) for x in (q_ref, k_ref, v_ref, dout_ref))
        before, after = before_ref[i], after_ref[i]
        dq = chunk.read * dot(dout, before, NT) + dot(P, k, NN)
        dv = chunk.write * dot(k, after, NN) + dot(A, dout, TN)
        dk = chunk.write * dot(v, after, NT) + dot(P, q, TN)
        for ref, x in ((dq_ref, dq), (dk_ref, dk), (dv_ref, dv)):
            ref[chunk.at] = x.astype(dtype)
        return following

    def body(walk):
        for h in range(blocks.heads):
            walk.fold(functools.partial(states, walk, h), saved_ref[h])
            carried_ref[h] = walk.fold(
                functools.partial(dstates, walk, h), carried_ref[h], reverse=True)
            walk.fold(functools.partial(gradients, walk, h), scores(walk, h, 0))

    walk.run(body, lengths_ref[b] - t * blocks.tokens, ragged)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        dfirst_ref[...] = carried_ref[...]


def backward(q_BTNH, k_BTNH, v_BTNH, slopes_N, saved_BcNHH, starts_BT, lengths_B, dout_BTNH,
             dlast_BNHH, *, blocks: Blocks, interpret=False):
    """Returns the gradients of q, k, v [B, T, N, H] and of the first state, float32 [B, N, H, H].

    saved_BcNHH: states before each of these `blocks`, from the forward pass.
    """
    B, T, N, H = q_BTNH.shape
    padding, lengths_B, ragged, extra = layout(q_BTNH, starts_BT, lengths_B, blocks)
    count = (T + padding) // blocks.tokens
    sequence, state, saved, extra_specs = specs(
        blocks, H, bool(extra), order=lambda t: count - 1 - t)
    inputs = [flat(x, padding) for x in (q_BTNH, k_BTNH, v_BTNH, dout_BTNH)]
    *grads, dfirst = pl.pallas_call(
        functools.partial(_backward_kernel, blocks=blocks, packed=bool(extra), ragged=ragged),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, N // blocks.heads, count),
            in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), *[sequence] * 4, saved, state,
                      *extra_specs],
            out_specs=[*[sequence] * 3, state],
            scratch_shapes=[
                *scratch(blocks, H),
                *[pltpu.VMEM((blocks.chunks, H, H), q_BTNH.dtype)] * 2,
            ],
        ),
        out_shape=[*[jax.ShapeDtypeStruct(inputs[0].shape, q_BTNH.dtype)] * 3,
                   jax.ShapeDtypeStruct((B, N, H, H), jnp.float32)],
        compiler_params=PARAMS,
        cost_estimate=pl.CostEstimate(
            flops=B * (T + padding) * N * 10 * H * (blocks.chunk + H),
            bytes_accessed=7 * inputs[0].nbytes + saved_BcNHH.nbytes, transcendentals=0),
        interpret=interpret,
        name="lightning_backward",
    )(lengths_B, slopes_N, *inputs, saved_BcNHH, dlast_BNHH, *extra)
    return *(x[:, :T].reshape(B, T, N, H) for x in grads), dfirst
