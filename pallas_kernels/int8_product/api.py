"""Public function of a product of few rows with an int8 matrix, and its choice of form."""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, precision, tuning
from pallas_kernels.grouped_matmul.stacked import Stacked, cut, stack
from pallas_kernels.quantized import TurnedTensor

# Beyond so many rows the matrices are read too often, and one large product is faster.
_MOST = 256


def int8_product(x_MK: jax.Array, weight: TurnedTensor | Stacked, *,
                 implementation: str | None = None) -> jax.Array:
    """`x · weight`, summed over all of the weight's inner axes; its scale multiplies the sum.

    Args:
      x_MK: float32 or bfloat16; K is the product of `weight.inner`.
      weight: one matrix, or one inside a stack of layers.
      implementation: "xla" (any device), "mosaic_gpu" (Hopper GPUs: bfloat16, K and N multiples of
        128; x is cut into two int8 parts per row, 15 bits under its largest value), or None: the
        kernel where it takes these, up to 256 rows, else "xla".

    Returns:
      float32 [M, N], N the product of `weight.outer`. Not differentiable by the kernel.

    Raises:
      ValueError: shapes that do not fit, an unknown implementation, or one that does not take
        these arguments or run here.
    """
    own = weight.whole if isinstance(weight, Stacked) else weight
    N, K = own.values.shape[-2:]
    if x_MK.ndim != 2 or x_MK.shape[1] != K:
        raise ValueError(f"x must be [M, {K}] for a weight of {own.inner} x {own.outer}; got "
                         f"{x_MK.shape}.")
    default = "mosaic_gpu" if product_fits(x_MK.shape[0], x_MK.dtype, weight) else "xla"
    run = dispatch.choose("int8_product", {"xla": _xla, "mosaic_gpu": _mosaic_gpu}, implementation,
                          default, (*x_MK.shape, N))
    return run(x_MK, weight)


def product_fits(rows: int, dtype, weight: TurnedTensor | Stacked) -> bool:
    """Whether this is a Hopper GPU whose kernel takes so many rows of `dtype` with `weight`."""
    own = weight.whole if isinstance(weight, Stacked) else weight
    return rows <= _MOST and matrices_fit(dtype, *own.values.shape[:-3:-1])


def matrices_fit(dtype, inner: int, outer: int) -> bool:
    """Whether this is a Hopper GPU whose kernel multiplies rows of `dtype` by such matrices."""
    if not tuning.hopper():
        return False
    from pallas_kernels.int8_product import mosaic_gpu

    return mosaic_gpu.refusal(jnp.dtype(dtype), inner, outer) is None


def _xla(x_MK, weight):
    own = cut(weight)
    out = jnp.einsum("mk,nk->mn", x_MK, own.values.astype(x_MK.dtype),
                     precision=precision.for_dtype(x_MK.dtype),
                     preferred_element_type=jnp.float32)
    return out * own.scale


def _mosaic_gpu(x_MK, weight, interpret=False):
    from pallas_kernels.int8_product import mosaic_gpu

    platform, M = dispatch.platform(), x_MK.shape[0]
    if platform != "gpu" and not interpret:
        raise ValueError("int8_product 'mosaic_gpu' runs on NVIDIA GPUs of the Hopper generation; "
                         f"this is a {platform}. Pass 'xla' or None.")
    values, scale, index_1 = stack(weight)
    if sentence := mosaic_gpu.refusal(x_MK.dtype, *values.shape[:-3:-1]):
        raise ValueError(sentence)
    rows = next((size for size in (16, 32) if M <= size), mosaic_gpu.MOST_ROWS)
    blocks = -(-M // rows)
    x_MK = jnp.pad(x_MK, ((0, blocks * rows - M), (0, 0)))
    out_1NM = mosaic_gpu.product(
        x_MK, values[:, None, None], scale[:, None, None], index_1,
        jnp.zeros(blocks, jnp.int32), jnp.full(1, blocks, jnp.int32), rows=rows,
        interpret=interpret)
    return out_1NM[0, :, :M].T
