"""One description of each parameter, and the factory through which modules obtain theirs."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Params = Mapping[str, Any]  # path -> jax.Array or int8 leaf


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """What a parameter is, before it exists.

    Attributes:
      path: its name, unique in the model.
      shape: sizes; block parameters lead with the repeats of their stack.
      dtype: name of the stored dtype.
      axes: logical axis of each dimension, None where nothing may shard it.
      init: "ones", "normal:STD", or "xavier:IN:OUT:GAIN" (fan-in, fan-out, gain).
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str | None, ...]
    init: str

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.size * jnp.dtype(self.dtype).itemsize

    @property
    def abstract(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shape, self.dtype)


@dataclasses.dataclass(frozen=True)
class Factory:
    """Hands each module its parameters: new, abstract, or taken from an existing tree.

    `create` maps a ParamSpec to a value. `repeats`, when given, leads every shape, so that one
    module description stands for all repeats of a layer.
    """

    create: Callable[[ParamSpec], Any]
    dtype: str
    prefix: str = ""
    repeats: int | None = None

    def at(self, name: str) -> "Factory":
        return dataclasses.replace(self, prefix=f"{self.prefix}{name}/")

    def param(self, name: str, shape, axes, init: str) -> nnx.Param:
        shape, axes = tuple(shape), tuple(axes)
        if self.repeats is not None:
            shape, axes = (self.repeats, *shape), ("layers", *axes)
        return nnx.Param(
            self.create(ParamSpec(f"{self.prefix}{name}", shape, self.dtype, axes, init))
        )


def xavier(fan_in: int, fan_out: int, gain: float = 1.0) -> str:
    """Xavier uniform initialiser with a gain, written for ParamSpec.init."""
    return f"xavier:{fan_in}:{fan_out}:{gain!r}"


def initial_value(spec: ParamSpec, key: jax.Array) -> jax.Array:
    """Draws a parameter from its description; traceable, so it can be born sharded."""
    kind, scale = initial_kind(spec)
    return draw(key, scale, kind, spec.shape, spec.dtype)


def initial_kind(spec: ParamSpec) -> tuple[str, float]:
    """Returns the distribution ("ones", "normal", "uniform") and its deviation or limit."""
    kind, *numbers = spec.init.split(":")
    if kind == "ones":
        return kind, 1.0
    if kind == "normal":
        return kind, float(numbers[0])
    fan_in, fan_out, gain = int(numbers[0]), int(numbers[1]), float(numbers[2])
    return "uniform", gain * (6.0 / (fan_in + fan_out)) ** 0.5


def draw(key: jax.Array, scale, kind: str, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Draws from a distribution of `initial_kind`."""
    if kind == "ones":
        return jnp.ones(shape, dtype)
    if kind == "normal":
        return (scale * jax.random.normal(key, shape, jnp.float32)).astype(dtype)
    return (scale * jax.random.uniform(key, shape, jnp.float32, -1.0, 1.0)).astype(dtype)
