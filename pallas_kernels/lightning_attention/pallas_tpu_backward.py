"""Lightning attention for TPU, backward: one pass from the last block to the first.

With D the decayed causal mask, A = D ∘ QKᵀ, P = D ∘ dO Vᵀ, S the state before a chunk and R the
gradient of the state after it (arXiv 2501.08313 §2.2, differentiated):

    dQ = P K + λ^(r+1) dO Sᵀ       dK = Pᵀ Q + λ^(C-1-c) V Rᵀ       dV = Aᵀ dO + λ^(C-1-c) K R

S of each block was saved by the forward pass (1/8 of the bytes of q at 2,048 tokens a block), those
of its chunks are rebuilt, so that q, k, v and dO are read once for all three gradients.

Compiled for v5e, v5p, v6e and tpu7x and run by the interpreter; not run on a TPU.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.lightning_attention.pallas_tpu import (
    NN,
    NT,
    TN,
    VMEM_BYTES,
    Blocks,
    chunk_at,
    dot,
    flat,
    iota,
    layout,
    specs,
    write_decays,
)


def _backward_kernel(
    lengths_ref, slopes_ref, q_ref, k_ref, v_ref, dout_ref, saved_ref, dlast_ref, *refs,
    blocks, H, packed, ragged
):
    refs = list(refs)
    packed = (refs.pop(0), refs.pop(0)) if packed else None
    dq_ref, dk_ref, dv_ref, dfirst_ref, *refs = refs
    carried_ref, mask_ref, read_ref, write_ref, before_ref = refs
    b, group, step = (pl.program_id(i) for i in range(3))
    t = pl.num_programs(2) - 1 - step
    C, dtype = blocks.chunk, q_ref.dtype

    @pl.when(step == 0)
    def _():
        carried_ref[...] = dlast_ref[...]
        for h in range(blocks.heads):
            slope = slopes_ref[group * blocks.heads + h]
            write_decays(slope, mask_ref.at[h], read_ref.at[h], write_ref.at[h], C, H)

    def setting(i, h, tokens):
        slope = slopes_ref[group * blocks.heads + h]
        chunk = chunk_at(
            i, (mask_ref[h], read_ref[h], write_ref[h]), slope, packed, tokens, C, H)
        start = i * C if isinstance(i, int) else pl.multiple_of(i * C, C)
        at = (pl.ds(start, C), pl.ds(h * H, H))

        def load(ref):
            x = ref[at]
            if tokens is None:
                return x
            # What lies beyond a row may be anything.
            return jnp.where(iota((C, H), 0) < tokens, x, jnp.zeros_like(x))

        return chunk, at, load

    def scaled(x, decay):
        return (x.astype(jnp.float32) * decay).astype(dtype)

    def rebuild(i, h, state, tokens=None):
        """The state before chunk i is kept for its gradients; the one after it is returned."""
        chunk, _, load = setting(i, h, tokens)
        before_ref[i] = state.astype(dtype)
        return chunk.carry * state + dot(scaled(load(k_ref), chunk.write), load(v_ref), TN)

    def gradients(i, h, dstate, tokens=None):
        """Gradients of chunk i are written; that of the state before it is returned."""
        chunk, at, load = setting(i, h, tokens)
        q, k, v, dout = (load(x) for x in (q_ref, k_ref, v_ref, dout_ref))
        after = dstate.astype(dtype)
        scores = chunk.mask(dot(q, k, NT)).astype(dtype)
        dscores = chunk.mask(dot(dout, v, NT)).astype(dtype)
        dq = dot(dscores, k, NN) + chunk.read * dot(dout, before_ref[i], NT)
        dk = dot(dscores, q, TN) + chunk.write * dot(v, after, NT)
        dv = dot(scores, dout, TN) + chunk.write * dot(k, after, NN)
        for ref, x in ((dq_ref, dq), (dk_ref, dk), (dv_ref, dv)):
            ref[at] = x.astype(dtype)
        return chunk.carry * dstate + dot(q, scaled(dout, chunk.read), TN)

    def whole():
        for h in range(blocks.heads):
            state, dstate = saved_ref[h], carried_ref[h]
            for i in range(blocks.chunks):
                state = rebuild(i, h, state)
            for i in reversed(range(blocks.chunks)):
                dstate = gradients(i, h, dstate)
            carried_ref[h] = dstate

    if not ragged:
        whole()
    else:
        left = lengths_ref[b] - t * blocks.tokens
        pl.when(left >= blocks.tokens)(whole)

        @pl.when(left < blocks.tokens)
        def _():
            for h in range(blocks.heads):
                def forth(i, state, h=h):
                    return rebuild(i, h, state, jnp.clip(left - i * C, 0, C))

                def back(j, dstate, h=h):
                    i = blocks.chunks - 1 - j
                    return gradients(i, h, dstate, jnp.clip(left - i * C, 0, C))

                jax.lax.fori_loop(0, blocks.chunks, forth, saved_ref[h])
                carried_ref[h] = jax.lax.fori_loop(0, blocks.chunks, back, carried_ref[h])

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
    C, heads, f32 = blocks.chunk, blocks.heads, jnp.float32
    sequence, state, extra_specs = specs(
        blocks, H, bool(extra), order=lambda t: count - 1 - t)
    saved = pl.BlockSpec(
        (None, None, heads, H, H), lambda b, n, t, *_: (b, count - 1 - t, n, 0, 0))
    inputs = [flat(x, padding) for x in (q_BTNH, k_BTNH, v_BTNH, dout_BTNH)]
    *grads, dfirst = pl.pallas_call(
        functools.partial(
            _backward_kernel, blocks=blocks, H=H, packed=bool(extra), ragged=ragged),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, N // heads, count),
            in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), *[sequence] * 4, saved, state,
                      *extra_specs],
            out_specs=[*[sequence] * 3, state],
            scratch_shapes=[
                *(pltpu.VMEM((heads, *shape), f32) for shape in ((H, H), (C, C), (C, H), (C, H))),
                pltpu.VMEM((blocks.chunks, H, H), q_BTNH.dtype),
            ],
        ),
        out_shape=[*[jax.ShapeDtypeStruct(inputs[0].shape, q_BTNH.dtype)] * 3,
                   jax.ShapeDtypeStruct((B, N, H, H), f32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_BYTES),
        cost_estimate=pl.CostEstimate(
            flops=B * (T + padding) * N * 10 * H * (C + H),
            bytes_accessed=7 * inputs[0].nbytes + saved_BcNHH.nbytes, transcendentals=0),
        interpret=interpret,
        name="lightning_backward",
    )(lengths_B, slopes_N, *inputs, saved_BcNHH, dlast_BNHH, *extra)
    return *(x[:, :T].reshape(B, T, N, H) for x in grads), dfirst
