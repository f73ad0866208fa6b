"""JAX's own grouped product for TPU (megablox), any number of rows, with gradients.

It cuts the inner axis too, so that it holds on any chip at any width; weights are then read once
per visited tile of rows. What is fed to it is materialised first: halves of a pair, int8 weights
that are cast, a layer cut out of its stack.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from pallas_kernels import dispatch
from pallas_kernels.grouped_matmul import tiles


def grouped_matmul(x_MD, w_EDF, group_sizes_E, *, interpret=None):
    """As the public function for plain weights. Returns x's dtype."""
    if interpret is None:
        interpret = dispatch.platform() == "cpu"
    M = x_MD.shape[0]
    rows = tiles.megablox_row_tile(M, w_EDF.shape[0])
    x_MD = jnp.pad(x_MD, ((0, -M % rows), (0, 0)))
    return _product(rows, interpret, x_MD, w_EDF, group_sizes_E.astype(jnp.int32))[:M]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(rows, interpret, x_MD, w_EDF, group_sizes_E):
    return _gmm(rows, interpret, x_MD, w_EDF, group_sizes_E, False)


def _forward(rows, interpret, x_MD, w_EDF, group_sizes_E):
    return _product(rows, interpret, x_MD, w_EDF, group_sizes_E), (x_MD, w_EDF, group_sizes_E)


def _backward(rows, interpret, residuals, grad_MF):
    x_MD, w_EDF, group_sizes_E = residuals
    grad_x = _gmm(rows, interpret, grad_MF, w_EDF, group_sizes_E, True)
    inner, columns = tiles.megablox_tiles(*w_EDF.shape[1:], x_MD.dtype, summed_rows=True)
    with _precise(x_MD.dtype):
        grad_w = tgmm(x_MD.swapaxes(0, 1), grad_MF, group_sizes_E, w_EDF.dtype,
                      (rows, inner, columns), interpret=interpret)
    return grad_x, grad_w, None


_product.defvjp(_forward, _backward)


def _gmm(rows, interpret, x_MK, w, group_sizes_E, transposed):
    """Rows beyond the groups hold anything in megablox, zeros here."""
    M, K = x_MK.shape
    N = w.shape[1] if transposed else w.shape[2]
    tiling = (rows, *tiles.megablox_tiles(K, N, x_MK.dtype))
    with _precise(x_MK.dtype):
        out_MN = gmm(x_MK, w, group_sizes_E, x_MK.dtype, tiling, transpose_rhs=transposed,
                     interpret=interpret)
    return jnp.where((jnp.arange(M) < jnp.sum(group_sizes_E))[:, None], out_MN, 0)


def _precise(dtype):
    """megablox's products take the precision in force, which for float32 is one bfloat16 pass."""
    if dtype == jnp.float32:
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()
