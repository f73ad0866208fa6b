"""A layer's weight, or its keys or values, as a place in the stack of all layers."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.quantized import QuantizedTensor, TurnedTensor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stacked:
    """The array `whole[index]`, not cut out yet.

    A scan over layers cuts each layer's weights out of their stack. XLA fuses that cut into its own
    products; in front of a kernel it copies the layer, which reads and writes all experts where few
    are hit. A kernel that is given the stack and a number reads it where it lies. So with caches: a
    layer writes its tokens into the stack, and nothing is put back.

    Attributes:
      whole: all layers' weights, keys or values [R, ...], or an int8 leaf of weights.
      index: int32 scalar.
    """

    whole: jax.Array | QuantizedTensor | TurnedTensor
    index: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one layer's weight."""
        return self.whole.shape[1:]

    @property
    def ndim(self) -> int:
        return self.whole.ndim - 1

    @property
    def dtype(self):
        return self.whole.dtype

    def swapaxes(self, first: int, second: int) -> "Stacked":
        """Two axes of the layer exchanged."""
        return Stacked(self.whole.swapaxes(first + 1, second + 1), self.index)

    def __getitem__(self, index):
        """Returns itself for `[...]`, the way modules read a parameter."""
        if index is not ...:
            raise TypeError("A Stacked is indexed by [...] alone; `cut` it.")
        return self


def cut(weight):
    """Returns the layer's own array, copied where XLA has to; others as they are."""
    if not isinstance(weight, Stacked):
        return weight
    return jax.tree.map(
        lambda leaf: jax.lax.dynamic_index_in_dim(leaf, weight.index, keepdims=False), weight.whole)


def stack(weight):
    """Returns (values [R, ...], scale [R, ...] or None, index [1]) for any kind of weight."""
    if isinstance(weight, Stacked):
        whole, index = weight.whole, weight.index
    else:
        whole, index = jax.tree.map(lambda leaf: leaf[None], weight), 0
    index = jnp.asarray(index, jnp.int32).reshape(1)
    if isinstance(whole, QuantizedTensor | TurnedTensor):
        return whole.values, whole.scale, index
    return whole, None, index
