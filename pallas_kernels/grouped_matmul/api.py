"""Public function of the grouped matrix product and the choice of its implementation."""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.grouped_matmul import reference, xla
from pallas_kernels.quantized import QuantizedTensor

_IMPLEMENTATIONS = {
    "reference": reference.grouped_matmul,
    "ragged_dot": xla.ragged_dot,
    "tiled": xla.tiled,
}


def grouped_matmul(
    x_MD: jax.Array,
    w_EDF: jax.Array | QuantizedTensor,
    group_sizes_E: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Multiplies consecutive groups of rows, each by its own matrix.

    Args:
      x_MD: float32 or bfloat16 rows, sorted by group.
      w_EDF: one matrix per group, of x's dtype, or int8 with a scale per output column, which is
        applied to the product.
      group_sizes_E: int32 rows per group, zeros allowed; rows beyond their sum give zeros.
      implementation: "reference" (every product, then a choice), "ragged_dot"
        (`jax.lax.ragged_dot`), "tiled" (one batched product over row tiles of one group each; the
        automatic choice on CPU, where ragged_dot runs 40 times slower), or None.

    Returns:
      [M, F] in x's dtype, summed in float32. Differentiable in x and w.

    Raises:
      ValueError: shapes that do not fit, or an unknown implementation.
    """
    if x_MD.ndim != 2 or w_EDF.ndim != 3 or x_MD.shape[1] != w_EDF.shape[1]:
        raise ValueError(f"x [M, D] and w [E, D, F] must share D; got {x_MD.shape}, {w_EDF.shape}.")
    if group_sizes_E.shape != w_EDF.shape[:1]:
        raise ValueError(
            f"group_sizes_E must have shape {w_EDF.shape[:1]}; got {group_sizes_E.shape}."
        )
    default = "tiled" if dispatch.platform() == "cpu" else "ragged_dot"
    run = dispatch.choose(
        "grouped_matmul", _IMPLEMENTATIONS, implementation, default, (x_MD.shape, w_EDF.shape)
    )
    if not isinstance(w_EDF, QuantizedTensor):
        return run(x_MD, w_EDF, group_sizes_E).astype(x_MD.dtype)
    out_MF = run(x_MD, w_EDF.values.astype(x_MD.dtype), group_sizes_E)
    group_M = xla.group_of_row(group_sizes_E, x_MD.shape[0])
    return (out_MF * jnp.take(w_EDF.scale[:, 0], group_M, axis=0)).astype(x_MD.dtype)
