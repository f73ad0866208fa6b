"""A decode step's experts on Hopper GPUs whose int8 matrices lie [out, in]: products of integers.

Rows are laid into blocks of one expert each, as in `hit_mosaic_gpu`; `int8_product` multiplies.
"""

import functools

import jax.numpy as jnp
import numpy as np

from pallas_kernels.experts.hit_mosaic_gpu import layout, rows_of_block, sum_by_token
from pallas_kernels.grouped_matmul.stacked import stack
from pallas_kernels.int8_product import mosaic_gpu
from pallas_kernels.int8_product.rows import two_parts_of


def refusal(g_TD, gate_up) -> str | None:
    """Says in a sentence why the kernel does not take these arguments; None if it does."""
    return mosaic_gpu.refusal(g_TD.dtype, *gate_up.shape[-2:])


def hit_experts(g_TD, weight_Tk, expert_Tk, gate_up, down, *, config=None, interpret=False):
    """As the public function; raises ValueError for a dtype or width that it does not take."""
    if sentence := refusal(g_TD, gate_up):
        raise ValueError(sentence)
    E = down.shape[0]
    config = config or mosaic_gpu.Config()
    rows = config.rows or rows_of_block(expert_Tk.size, E)
    slot_M, source, (matrices, count_1) = layout(expert_Tk, E, rows)
    up_values, up_scale, index_1 = stack(gate_up)
    down_values, down_scale, _ = stack(down)
    call = functools.partial(mosaic_gpu.product, index_1=index_1, matrix_B=matrices,
                             count_1=count_1, rows=rows, config=config, interpret=interpret)
    cut = functools.partial(two_parts_of, interpret=interpret)
    # Rows of padding take token 0: their sums are finite and read by nobody.
    hidden_FM = call(cut(g_TD, source), up_values, up_scale, swiglu=True)
    again = None
    if len(g_TD) == 1:  # each block has one row that counts: its first
        hidden_FM, again = hidden_FM[:, ::rows], jnp.asarray(np.arange(len(source)) // rows)
    out_1DM = call(cut(hidden_FM.T, again), down_values[:, None], down_scale[:, None])
    return sum_by_token(out_1DM[0], slot_M, weight_Tk, expert_Tk, E)
