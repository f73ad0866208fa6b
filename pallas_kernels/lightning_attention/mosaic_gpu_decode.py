"""Lightning attention for one token on Hopper GPUs: each state is read and written once, in place.

A block owns some columns of one head's state. TMA brings them to shared memory and takes them back;
several blocks share a multiprocessor, so that one's arithmetic hides behind the others' traffic.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.lightning_attention.mosaic_gpu_block import load

_WGMMA = plgpu.Layout.WGMMA
_TILES = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """columns: width of a block's share of the state, 32, 64 or 128."""

    columns: int = 64


def decode(
    q_BNH, k_BNH, v_BNH, slopes_N, states_PNHH, slots_B,
    *, config: DecodeConfig | None = None, interpret=False,
):
    """One step of `S = λ S + k^T v`, `o = q S` for the states in `slots_B`.

    Args:
      q_BNH, k_BNH, v_BNH: bfloat16, H = 64 or 128.
      slopes_N: float32; states_PNHH: float32, donate it to have it updated in place.
      slots_B: int32, each row's own state, no two alike; a negative slot is an inert row, whose
        output is zero.

    Returns:
      The output [B, N, H] bfloat16 and all states, those of `slots_B` updated.
    """
    B, N, H = q_BNH.shape
    W = min((config or DecodeConfig()).columns, H)
    if any(x.dtype != jnp.bfloat16 for x in (q_BNH, k_BNH, v_BNH)):
        raise ValueError(
            f"the Mosaic GPU kernel takes bfloat16; got {q_BNH.dtype}. Cast q, k and v, or use "
            "implementation='xla' for float32."
        )
    if H not in (64, 128):
        raise ValueError(
            f"the Mosaic GPU kernel takes heads of 64 or 128; got {H}. Use implementation='xla'."
        )
    if W not in (32, 64, 128):
        raise ValueError(f"columns must be 32, 64 or 128; got {W}.")
    if not hasattr(plgpu, "InterpretGPUParams"):
        raise ValueError(
            "the Mosaic GPU decode updates states in place, which needs jax 0.11 or newer; got "
            f"{jax.__version__}. Upgrade jax, or use implementation='xla'."
        )

    def lightning_decode(q_ref, k_ref, v_ref, slopes_ref, slots_ref, states_ref, out_ref,
                         tile, arrived):
        b, n = lax.axis_index("batch"), lax.axis_index("head")
        columns = pl.ds(lax.axis_index("column") * W, W)
        slot = slots_ref[b]

        @pl.when(slot >= 0)
        def _():
            state_ref = states_ref.at[slot, n, :, columns]
            plgpu.copy_gmem_to_smem(state_ref, tile, arrived)

            def vector(ref, layout):
                return load(ref, layout=layout, optimized=False).astype(jnp.float32)

            q = vector(q_ref.at[b, n], _WGMMA.reduce(1))
            k = vector(k_ref.at[b, n], _WGMMA.reduce(1))
            v = vector(v_ref.at[b, n, columns], _WGMMA.reduce(0))
            by_row = lambda x: lax.broadcast_in_dim(x, (H, W), [0])  # noqa: E731
            update = by_row(k) * lax.broadcast_in_dim(v, (H, W), [1])
            decay = jnp.exp(-slopes_ref[n])
            plgpu.barrier_wait(arrived)
            state = load(tile, layout=_WGMMA) * decay + update
            tile[...] = state
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tile, state_ref)
            out_ref[b, n, columns] = jnp.sum(by_row(q) * state, axis=0).astype(jnp.bfloat16)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(slot < 0)
        def _():
            zeros = plgpu.layout_cast(jnp.zeros((W,), jnp.bfloat16), _WGMMA.reduce(0))
            out_ref[b, n, columns] = zeros

    states = jax.new_ref(states_PNHH)
    out = plgpu.kernel(
        lightning_decode,
        out_type=jax.ShapeDtypeStruct((B, N, H), jnp.bfloat16),
        scratch_types=[
            plgpu.SMEM((H, W), jnp.float32, transforms=_TILES), plgpu.Barrier(num_barriers=1),
        ],
        grid=(B, N, H // W),
        grid_names=("batch", "head", "column"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret or None,
    )(q_BNH, k_BNH, v_BNH, jnp.asarray(slopes_N, jnp.float32), slots_B.astype(jnp.int32), states)
    return out, jax.freeze(states)
