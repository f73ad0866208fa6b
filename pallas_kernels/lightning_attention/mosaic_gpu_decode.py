"""Lightning attention for one token on Hopper GPUs: each state is read and written once, in place.

A block owns 64 columns of one head's state and holds them in registers: every thread asks for all
its part, 16 bytes at a time, before it works on the first. Shared memory between, filled and
emptied by TMA, was slower at every batch.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.costs import kernel_cost
from pallas_kernels.lightning_attention.mosaic_gpu_block import IN_PLACE as AVAILABLE
from pallas_kernels.lightning_attention.mosaic_gpu_block import load

W = 64      # columns of a block, 256 bytes of a row: with 32, and with 128, it was slower
PIECES = 2  # of a block's rows, each with its own part of q and k: a third fewer registers than one


def decode(q_BNH, k_BNH, v_BNH, slopes_N, states_PNHH, slots_B, *, interpret=False):
    """One step of `S = λ S + k^T v`, `o = q S` for the states in `slots_B`.

    Args:
      q_BNH, k_BNH, v_BNH: bfloat16, H = 64 or 128.
      slopes_N: float32; states_PNHH: float32, donate it to have it updated in place.
      slots_B: int32, each row's own state, no two alike; a negative slot is an inert row, whose
        output is zero.
      interpret: False, or `plgpu.InterpretGPUParams`.

    Returns:
      The output [B, N, H] bfloat16 and all states, those of `slots_B` updated.

    Raises:
      ValueError: other dtypes or widths, or a jax before 0.11.
    """
    B, N, H = q_BNH.shape
    if any(x.dtype != jnp.bfloat16 for x in (q_BNH, k_BNH, v_BNH)):
        raise ValueError(
            f"the Mosaic GPU kernel takes bfloat16; got {q_BNH.dtype}. Cast q, k and v, or use "
            "implementation='xla' for float32."
        )
    if H not in (64, 128):
        raise ValueError(
            f"the Mosaic GPU kernel takes heads of 64 or 128; got {H}. Use implementation='xla'."
        )
    if not AVAILABLE:
        raise ValueError(
            "the Mosaic GPU decode updates states in place, which needs jax 0.11 or newer; got "
            f"{jax.__version__}. Upgrade jax, or use implementation='xla'."
        )
    R, layout = H // PIECES, _layout()

    def vector(ref, axis):
        """A vector in the place of the square's rows or columns that it goes with."""
        return load(ref, layout=layout.reduce(1 - axis), optimized=False).astype(jnp.float32)

    def over(x, axis):
        return lax.broadcast_in_dim(x, (R, W), [axis])

    def lightning_decode(q_ref, k_ref, v_ref, slopes_ref, slots_ref, states_ref, out_ref):
        b, n = lax.axis_index("batch"), lax.axis_index("head")
        columns = pl.ds(lax.axis_index("column") * W, W)
        slot = slots_ref[b]

        @pl.when(slot >= 0)
        def _():
            rows = [pl.ds(i * R, R) for i in range(PIECES)]
            places = [states_ref.at[slot, n, one, columns] for one in rows]
            # All are asked for here; what follows waits for one after another.
            states = [load(place, layout=layout, optimized=False) for place in places]
            decay, v = jnp.exp(-slopes_ref[n]), over(vector(v_ref.at[b, n, columns], 1), 1)
            read = jnp.float32(0.0)
            for one, place, state in zip(rows, places, states, strict=True):
                q, k = (over(vector(ref.at[b, n, one], 0), 0) for ref in (q_ref, k_ref))
                state = state * decay + k * v
                place[...] = state
                read += q * state
            out_ref[b, n, columns] = jnp.sum(read, axis=0).astype(jnp.bfloat16)

        @pl.when(slot < 0)
        def _():
            out_ref[b, n, columns] = plgpu.layout_cast(
                jnp.zeros((W,), jnp.bfloat16), layout.reduce(0))

    states = jax.new_ref(states_PNHH)
    run = plgpu.kernel(
        lightning_decode,
        out_type=jax.ShapeDtypeStruct((B, N, H), jnp.bfloat16),
        grid=(B, N, H // W),
        grid_names=("batch", "head", "column"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret or None,
    )
    # Of a pool those states that have a row: as many as there are.
    with kernel_cost(5 * B * N * H * H, 8 * B * N * H * H):
        out = run(q_BNH, k_BNH, v_BNH, jnp.asarray(slopes_N, jnp.float32),
                  slots_B.astype(jnp.int32), states)
    return out, jax.freeze(states)


def _layout():
    """Where a square of float32 lies in registers: half a warp takes W columns of a row, 16 bytes a
    thread, so that four warps take 8 rows, and the same threads the 8 below."""
    tiling = mgpu.fragmented_array.Tiling(((8, W), (2, W), (4,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
