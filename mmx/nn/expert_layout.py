"""Layouts of the experts' weights, and parts of them."""

import jax

from mmx.nn.wide import Wide
from pallas_kernels.grouped_matmul.stacked import Stacked, cut
from pallas_kernels.quantized import TurnedTensor, dequantize


def halves(gate_up):
    """The matrices of gate and of up, [E, D, F] each."""
    return (jax.tree.map(lambda w, c=c: w[c], gate_up) for c in range(2))


def narrow(gate_up, E: int, F: int):
    """Returns gate_up as [2, E, D, F], however it is laid."""
    if not isinstance(gate_up, Wide):
        return gate_up
    return gate_up.values.reshape(-1, E, 2, F).transpose(2, 1, 0, 3)


def is_turned(weight) -> bool:
    """Whether the weight is a turned leaf, or a place in a stack of such."""
    return isinstance(weight.whole if isinstance(weight, Stacked) else weight, TurnedTensor)


def plain(weight):
    """Returns the weight; a turned leaf turned back, and cut out of its stack."""
    return cut(weight).plain() if is_turned(weight) else weight


def merged(gate_up):
    """Returns [2, E, D, F] as [E, D, 2F]: one product for gate and up."""
    def join(w):
        return w.transpose(1, 2, 0, 3).reshape(w.shape[1], w.shape[2], -1)

    return jax.tree.map(join, gate_up)


def one_expert(weight, index, dtype):
    """The matrix of one expert; a plain int8 leaf is cut before it is multiplied out."""
    one = jax.tree.map(
        lambda w: jax.lax.dynamic_index_in_dim(w, index, 0, keepdims=False), weight)
    return dequantize(one, dtype)
