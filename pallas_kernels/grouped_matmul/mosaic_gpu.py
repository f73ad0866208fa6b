"""JAX's own grouped product for Hopper (`ragged_dot_mgpu`): bfloat16, forward only.

Named only: `hopper` is the choice there. The tiles in `tiles.json` are the best of a few that were
measured on an H200.
"""

import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.grouped_matmul import tiles


def refusal(x_MD, w_EDF) -> str | None:
    """Says in a sentence why the kernel does not take these arguments; None if it does."""
    if dispatch.platform() != "gpu":
        return ("grouped_matmul 'mosaic_gpu' runs on an NVIDIA GPU of Hopper's generation. "
                "Pass None.")
    if x_MD.dtype != jnp.bfloat16 or w_EDF.dtype != jnp.bfloat16:
        return (f"grouped_matmul 'mosaic_gpu' got x of {x_MD.dtype} and w of {w_EDF.dtype}. "
                "Both must be bfloat16; cast them, or pass None.")
    if w_EDF.shape[1] % 64 or w_EDF.shape[2] % 64:
        return (f"grouped_matmul 'mosaic_gpu' got matrices of {w_EDF.shape[1:]}. "
                "It takes multiples of 64; pass None.")
    return None


def grouped_matmul(x_MD, w_EDF, group_sizes_E, *, sizes=None):
    """As the public function for plain bfloat16 weights; `sizes` replaces the listed tiles.

    Raises ValueError for another platform, dtype, or a shape that TMA cannot load.
    """
    if sentence := refusal(x_MD, w_EDF):
        raise ValueError(sentence)
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

    M, (E, D, F) = x_MD.shape[0], w_EDF.shape
    out_MF = ragged_dot_mgpu.ragged_dot(
        x_MD, w_EDF, group_sizes=group_sizes_E.astype(jnp.int32),
        **(sizes or tile_sizes(M, E, D, F)))
    return jnp.where((jnp.arange(M) < jnp.sum(group_sizes_E))[:, None], out_MF, 0)


def tile_sizes(M: int, E: int, D: int, F: int) -> dict[str, int]:
    """Returns the tiles listed for the shape, else by rule: half-size rows for small groups."""
    found = tiles.listed("mosaic_gpu", M, D, F)
    if found is not None:
        return found
    rows = 128 if M >= 128 * E else 64
    return {"block_m": rows, "block_n": 64 if F % 128 else 128, "block_k": 64,
            "max_concurrent_steps": 4, "grid_block_n": 1}
