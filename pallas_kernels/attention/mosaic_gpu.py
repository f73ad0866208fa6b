"""Flash decoding on Hopper GPUs: one query a row over keys and values where they lie in a stack.

A block of threads owns one key head of one row and a part of its context, which it takes in tiles
of 64 keys through TMA, with a running softmax in registers. The query heads of a group are rows of
one product, filled up to the 64 of the matrix instruction: memory sets the pace. Parts are merged
by their peaks in float32. Tiles beyond a row's length are neither fetched nor computed.

Never chosen automatically: on an H100 it reads at 96 % of a copy's rate, cuDNN's pages at 99.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tuning
from pallas_kernels.attention.shares import NEG_INF
from pallas_kernels.costs import kernel_cost
from pallas_kernels.grouped_matmul.stacked import stack
from pallas_kernels.lightning_attention.mosaic_gpu_block import TILES, transposed

C = ROWS = 64  # keys of a tile; rows of a product
STAGES = 2     # so that two blocks share a multiprocessor
_BLOCKS = 4 * 132  # of the whole grid at least, where the context has as many parts
_WGMMA = plgpu.Layout.WGMMA
_ROW = _WGMMA.reduce(1)


def refusal(q_BTNH, k_BSKH, offsets_B, packed) -> str | None:
    """Says in a sentence why the kernel does not take these arguments; None if it does."""
    (_, T, N, H), (_, S, K, _) = q_BTNH.shape, k_BSKH.shape
    if not tuning.hopper():
        return "attention 'mosaic_gpu' runs on NVIDIA GPUs of the Hopper generation. Pass None."
    if packed is not None or offsets_B is None or T != 1:
        return "attention 'mosaic_gpu' takes one query a row, at offsets. Pass 'cudnn' or None."
    if any(x.dtype != jnp.bfloat16 for x in (q_BTNH, k_BSKH)):
        return (f"attention 'mosaic_gpu' got q of {q_BTNH.dtype} and k of {k_BSKH.dtype}. "
                "Both must be bfloat16: cast them, or pass 'xla' or None.")
    if H not in (64, 128) or N // K > ROWS or S % C:
        return (f"attention 'mosaic_gpu' got heads of {H}, {N // K} of them over one of keys, and "
                f"{S} slots. It takes 64 or 128, at most {ROWS}, and a multiple of {C}.")
    return None


def attention(q_BTNH, k_BSKH, v_BSKH, offsets_B, samples_BT):
    """As the public function, one query a row; keys and values may be `Stacked`."""
    if sentence := refusal(q_BTNH, k_BSKH, offsets_B, samples_BT):
        raise ValueError(sentence)
    lengths_B = jnp.asarray(offsets_B, jnp.int32) + 1
    weighted, total, _ = decode(q_BTNH, k_BSKH, v_BSKH, lengths_B)
    return (weighted / total[..., None]).astype(q_BTNH.dtype)


def partial_attention(q_BTNH, k_BSKH, v_BSKH, offsets_B, stride, phase, own, apart, ends_BS):
    """As the public function, one query a row; keys and values may be `Stacked`."""
    if sentence := refusal(q_BTNH, k_BSKH, offsets_B, ends_BS):
        raise ValueError(sentence)
    held_B = -(-(jnp.asarray(offsets_B, jnp.int32) + 1 - phase) // stride)
    return decode(q_BTNH, k_BSKH, v_BSKH, jnp.clip(held_B, 0, k_BSKH.shape[1]))


def decode(q_B1NH, k_BSKH, v_BSKH, lengths_B, *, parts=None, interpret=False):
    """Sums over each row's first `lengths_B` keys, as of `partial_attention`.

    `parts` of the context, and `interpret`, are for tests.
    """
    B, _, N, H = q_B1NH.shape
    S, K = k_BSKH.shape[1:3]
    G, tiles = N // K, S // C
    parts = parts or max(1, min(-(-_BLOCKS // (B * K)), tiles // 8))
    (k, _, layer_1), (v, _, _) = (stack(x.swapaxes(1, 2)) for x in (k_BSKH, v_BSKH))
    k_RKSH, v_RKSH = (x.reshape(-1, K, S, H) for x in (k, v))
    q_PGH = jnp.pad(q_B1NH.reshape(B * K, G, H), ((0, 0), (0, ROWS - G), (0, 0)))
    run = plgpu.kernel(
        _program(B, K, H, parts),
        out_type=[jax.ShapeDtypeStruct((B * K, parts, ROWS, H), jnp.float32),
                  *[jax.ShapeDtypeStruct((B * K, parts, ROWS), jnp.float32)] * 2],
        scratch_types={
            "q_smem": plgpu.SMEM((ROWS, H), jnp.bfloat16, transforms=TILES),
            "k_smem": plgpu.SMEM((STAGES, C, H), jnp.bfloat16, transforms=TILES),
            "v_smem": plgpu.SMEM((STAGES, C, H), jnp.bfloat16, transforms=TILES),
            "weights": plgpu.SMEM((ROWS, C), jnp.bfloat16, transforms=TILES),
            "asked": plgpu.Barrier(),
            "full": plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            "done": plgpu.Barrier()},
        grid=(parts, B * K), grid_names=("part", "head"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret or None)
    with kernel_cost(4 * B * N * S * H, 2 * B * K * S * H * 2):  # of a full cache
        weighted, total, peak = run(layer_1 * B, lengths_B.astype(jnp.int32), q_PGH, k_RKSH, v_RKSH)
    highest = peak.max(1, keepdims=True)
    scale = jnp.exp(peak - highest)
    weighted = (weighted * scale[..., None]).sum(1)[:, :G]
    return (weighted.reshape(B, 1, N, H), (total * scale).sum(1)[:, :G].reshape(B, 1, N),
            highest[:, 0, :G].reshape(B, 1, N))


def _program(B, K, H, parts):
    scale = math.log2(math.e) / math.sqrt(H)  # scores are in units of log 2, as exp2 is cheaper

    def by_row(x, width):
        return lax.broadcast_in_dim(x, (ROWS, width), [0])

    def attention_decode(first_row, lengths, q, k, v, out, total_ref, peak_ref, *, q_smem, k_smem,
                         v_smem, weights, asked, full, done):
        head, part = lax.axis_index("head"), lax.axis_index("part")
        b, n = lax.div(head, jnp.int32(K)), lax.rem(head, jnp.int32(K))
        row, length = first_row[0] + b, lengths[b]
        tiles = lax.div(length + (C - 1), jnp.int32(C))
        each = lax.div(tiles + (parts - 1), jnp.int32(parts))
        first = part * each
        count = jnp.clip(tiles - first, 0, each)

        def fetch(i):
            slot, keys = lax.rem(i, jnp.int32(STAGES)), pl.ds((first + i) * C, C)
            for source, target in ((k, k_smem), (v, v_smem)):
                plgpu.copy_gmem_to_smem(source.at[row, n, keys], target.at[slot], full.at[slot])

        plgpu.copy_gmem_to_smem(q.at[head], q_smem, asked)
        for i in range(STAGES):
            pl.when(i < count)(lambda i=i: fetch(jnp.int32(i)))
        plgpu.barrier_wait(asked)
        column = plgpu.broadcasted_iota(jnp.int32, (ROWS, C), 1, layout=_WGMMA)

        def product(width, left, right):
            def multiply(acc):
                plgpu.wgmma(acc, left, right)
                return acc[...]

            return pl.run_scoped(multiply, plgpu.ACC((ROWS, width), jnp.float32))

        def step(i, carry):
            acc, total, peak = carry
            slot = lax.rem(i, jnp.int32(STAGES))
            plgpu.barrier_wait(full.at[slot])
            scores = product(C, q_smem, transposed(k_smem.at[slot])) * scale
            scores = jnp.where(column < length - (first + i) * C, scores, NEG_INF)
            new = jnp.maximum(peak, jnp.max(scores, axis=1))
            share = jnp.exp2(scores - by_row(new, C))
            rescale = jnp.exp2(peak - new)
            weights[...] = share.astype(jnp.bfloat16)
            plgpu.commit_smem()
            acc = acc * by_row(rescale, H) + product(H, weights, v_smem.at[slot])
            # All four warps are done with the slot: it may be filled again.
            plgpu.barrier_arrive(done)
            plgpu.barrier_wait(done)
            pl.when(i + STAGES < count)(lambda: fetch(i + STAGES))
            return acc, total * rescale + jnp.sum(share, axis=1), new

        start = (plgpu.layout_cast(jnp.zeros((ROWS, H), jnp.float32), _WGMMA),
                 plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), _ROW),
                 plgpu.layout_cast(jnp.full((ROWS,), NEG_INF, jnp.float32), _ROW))
        acc, total, peak = lax.fori_loop(0, count, step, start)
        out[head, part] = acc
        total_ref[head, part] = total
        peak_ref[head, part] = peak * math.log(2.0)

    return attention_decode
