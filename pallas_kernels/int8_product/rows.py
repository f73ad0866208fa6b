"""Rows cut into two int8 parts, gathered on the way (Pallas Mosaic GPU), for `mosaic_gpu.product`.

XLA writes them in two programs or more, byte by byte where it gathers: for the 608 rows of 64
tokens' experts that took as long as to read 80 MB of weights.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.costs import kernel_cost
from pallas_kernels.lightning_attention.mosaic_gpu_block import load

MOST = 127 * 128 + 63  # the largest integer of two parts
_THREADS = 128


def two_parts(x_MK):
    """int8 [2, M, K] and float32 peaks [M] with `x ≈ peak / MOST (128 parts[0] + parts[1])`."""
    x_MK = x_MK.astype(jnp.float32)
    peak_M = jnp.max(jnp.abs(x_MK), axis=1)
    # The peaks leave as they are: what is made of them fuses into what follows.
    return jnp.stack(_cut(x_MK, peak_M[:, None])).astype(jnp.int8), peak_M


@functools.partial(jax.jit, static_argnames="interpret")
def two_parts_of(x_TK, source_M=None, *, interpret=False):
    """`two_parts(x_TK[source_M])` by one kernel, the same for all layers; a block for each row.

    Args:
      x_TK: bfloat16, K a multiple of 128.
      source_M: int32 in [0, T); None takes every row in its place.
    """
    T, K = x_TK.shape
    M = T if source_M is None else len(source_M)
    each = K // _THREADS
    layout = plgpu.Layout.WG_STRIDED((K,), vec_size=next(v for v in (8, 4, 2, 1) if each % v == 0))

    def int8_rows(x, *refs):
        *source, parts, peaks = refs
        m = lax.axis_index("row")
        own = x.at[source[0][m] if source else m]
        row = load(own, layout=layout, optimized=False).astype(jnp.float32)
        peak = jnp.max(jnp.abs(row))
        for part, ref in zip(_cut(row, peak), (parts.at[0, m], parts.at[1, m]), strict=True):
            ref[...] = part.astype(jnp.int8)
        peaks[m] = peak

    run = plgpu.kernel(
        int8_rows,
        out_type=(jax.ShapeDtypeStruct((2, M, K), jnp.int8),
                  jax.ShapeDtypeStruct((M,), jnp.float32)),
        grid=(M,), grid_names=("row",),
        compiler_params=plgpu.CompilerParams(approx_math=False),
        interpret=interpret or None,
    )
    with kernel_cost(8 * M * K, 2 * T * K + 2 * M * K):
        return run(x_TK, *([] if source_M is None else [source_M.astype(jnp.int32)]))


def _cut(x, peak):
    """Both parts of float32 `x`, as int32."""
    step = jnp.where(peak == 0, 0, MOST / peak)
    # A peak so small that its inverse overflows would make integers of any size.
    whole = lax.round(jnp.clip(x * step, -MOST, MOST), lax.RoundingMethod.TO_NEAREST_EVEN)
    whole = whole.astype(jnp.int32)
    high = (whole + 64) >> 7
    return high, whole - (high << 7)
