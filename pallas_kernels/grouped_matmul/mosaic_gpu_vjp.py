"""Our kernels for Hopper as the public functions call them: with refusals and gradients.

The gradient in x is the same kernel on transposed weights, that in the weights is XLA's: they are
there so that training runs. The kernels are made for inference.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.grouped_matmul import mosaic_gpu_kernel, xla
from pallas_kernels.grouped_matmul.stacked import Stacked


@jax.custom_vjp
def grouped_matmul(x_MD, w_EDF, group_sizes_E):
    """As the public function, for bfloat16; raises ValueError elsewhere than on Hopper."""
    _check()
    return mosaic_gpu_kernel.grouped_matmul(x_MD, w_EDF, group_sizes_E)


def turned_grouped_matmul(x_MD, weight, group_sizes_E):
    """`grouped_matmul` by a `TurnedTensor`, whose values are cast in main memory; forward only."""
    _check()
    return mosaic_gpu_kernel.grouped_matmul(
        x_MD, weight.values.astype(x_MD.dtype), group_sizes_E, turned=True, scale_EF=weight.scale)


def turned_grouped_swiglu(x_MD, weight, group_sizes_E):
    """`grouped_swiglu` by a `TurnedTensor`, as `turned_grouped_matmul`."""
    _check()
    return mosaic_gpu_kernel.grouped_swiglu(
        x_MD, weight.values.astype(x_MD.dtype), group_sizes_E, turned=True, scale_2EF=weight.scale)


@jax.custom_vjp
def grouped_swiglu(x_MD, w_2EDF, group_sizes_E):
    """As the public function, for bfloat16; raises ValueError elsewhere than on Hopper."""
    _check()
    return mosaic_gpu_kernel.grouped_swiglu(x_MD, w_2EDF, group_sizes_E)


def _matmul_forward(x_MD, w_EDF, group_sizes_E):
    _check()
    # Arrays that change in place cannot be differentiated inside a scan.
    out_MF = mosaic_gpu_kernel.grouped_matmul(x_MD, w_EDF, group_sizes_E, pace=False)
    return out_MF, (x_MD, w_EDF, group_sizes_E)


def _matmul_backward(residuals, grad_MF):
    x_MD, w_EDF, group_sizes_E = residuals
    _check_plain(w_EDF)
    if w_EDF.shape[1] % 128:  # too narrow for an item of the transposed product
        _, back = jax.vjp(lambda x: xla.ragged_dot(x, w_EDF, group_sizes_E), x_MD)
        (grad_x,) = back(grad_MF.astype(jnp.float32))
    else:
        grad_x = grouped_matmul(grad_MF, w_EDF.swapaxes(1, 2), group_sizes_E)
    _, back = jax.vjp(lambda w: xla.ragged_dot(x_MD, w, group_sizes_E), w_EDF)
    return grad_x, *back(grad_MF.astype(jnp.float32)), None


def _swiglu_forward(x_MD, w_2EDF, group_sizes_E):
    _check()
    out_MF = mosaic_gpu_kernel.grouped_swiglu(x_MD, w_2EDF, group_sizes_E, pace=False)
    return out_MF, (x_MD, w_2EDF, group_sizes_E)


def _swiglu_backward(residuals, grad_MF):
    """Through two products computed anew: nothing but the arguments is kept."""
    x_MD, w_2EDF, group_sizes_E = residuals
    _check_plain(w_2EDF)

    def two(x, w):
        gate, up = (grouped_matmul(x, w[c], group_sizes_E).astype(jnp.float32) for c in range(2))
        return (jax.nn.silu(gate) * up).astype(x.dtype)

    # Rows beyond the groups may hold anything, and so may their gradients.
    inside = jnp.arange(x_MD.shape[0]) < jnp.sum(group_sizes_E)
    _, back = jax.vjp(two, x_MD, w_2EDF)
    return *back(jnp.where(inside[:, None], grad_MF, 0)), None


grouped_matmul.defvjp(_matmul_forward, _matmul_backward)
grouped_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _check():
    if not tuning.hopper():
        raise ValueError("grouped_matmul 'hopper' runs on an NVIDIA GPU of Hopper's generation. "
                         "Pass None.")


def _check_plain(weight):
    if isinstance(weight, Stacked):
        raise ValueError("Weights inside a stack have no gradient: `cut` them in training.")
