"""int8 weights with a scale per output channel."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """A weight stored as `values * scale`.

    Attributes:
      values: int8, the weight's shape.
      scale: float32, the same rank with 1 at every contracted axis, so that it broadcasts.
    """

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return len(self.values.shape)

    @property
    def dtype(self):
        return self.values.dtype

    def __getitem__(self, index):
        """Returns itself for `[...]`, the way modules read a parameter; rows are not cut here."""
        if index is not ...:
            raise TypeError("A QuantizedTensor is indexed by [...] alone; index values and scale.")
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales together."""
        return self.values.nbytes + self.scale.nbytes


def dequantize(x: jax.Array | QuantizedTensor, dtype) -> jax.Array:
    """Returns `x` as a plain array of `dtype`; the product with the scale is rounded once."""
    if isinstance(x, QuantizedTensor):
        return (x.values.astype(jnp.float32) * x.scale).astype(dtype)
    return x.astype(dtype)
