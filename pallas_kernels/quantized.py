"""int8 weights with a scale per output channel."""

import dataclasses
import functools
import math

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


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "scale"],
                   meta_fields=["inner_tail", "outer_tail"])
@dataclasses.dataclass(frozen=True)
class TurnedTensor:
    """A QuantizedTensor [..., *inner, *outer], contracted over `inner`, as matrices [out, in].

    A matrix unit that multiplies integers takes them with the contracted axis innermost.

    Attributes:
      values: int8 [..., prod(outer), prod(inner)].
      scale: float32 [..., prod(outer)].
      inner_tail, outer_tail: sizes of all axes of a group but its first, whose own follows from
        the values: what a device holds of a leaf is one, too.
    """

    values: jax.Array
    scale: jax.Array
    inner_tail: tuple[int, ...] = ()
    outer_tail: tuple[int, ...] = ()

    @classmethod
    def of(cls, x: QuantizedTensor, contracted: tuple[int, ...]) -> "TurnedTensor":
        """`contracted`: neighbouring axes, the ones that `x` is summed over."""
        first, last = contracted[0], contracted[-1] + 1
        lead, inner, outer = x.shape[:first], x.shape[first:last], x.shape[last:]
        flat = x.values.reshape(*lead, math.prod(inner), math.prod(outer))
        return cls(flat.swapaxes(-1, -2), x.scale.reshape(*lead, math.prod(outer)), inner[1:],
                   outer[1:])

    def plain(self) -> QuantizedTensor:
        """The same weight as a QuantizedTensor."""
        lead = self.values.shape[:-2]
        ones = (1,) * len(self.inner)
        return QuantizedTensor(self.values.swapaxes(-1, -2).reshape(self.shape),
                               self.scale.reshape(*lead, *ones, *self.outer))

    @property
    def inner(self) -> tuple[int, ...]:
        """Sizes of the contracted axes."""
        return self.values.shape[-1] // math.prod(self.inner_tail), *self.inner_tail

    @property
    def outer(self) -> tuple[int, ...]:
        """Sizes of the axes behind them."""
        return self.values.shape[-2] // math.prod(self.outer_tail), *self.outer_tail

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.values.shape[:-2], *self.inner, *self.outer)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self):
        return self.values.dtype

    def __getitem__(self, index):
        """Returns itself for `[...]`, the way modules read a parameter."""
        if index is not ...:
            raise TypeError("A TurnedTensor is indexed by [...] alone; index values and scale.")
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales together."""
        return self.values.nbytes + self.scale.nbytes


def dequantize(x: jax.Array | QuantizedTensor | TurnedTensor, dtype) -> jax.Array:
    """Returns `x` as a plain array of `dtype`; the product with the scale is rounded once."""
    if isinstance(x, TurnedTensor):
        x = x.plain()
    if isinstance(x, QuantizedTensor):
        return (x.values.astype(jnp.float32) * x.scale).astype(dtype)
    return x.astype(dtype)
