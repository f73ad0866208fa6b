"""int8 weight-only quantisation: which parameters, along which axes, and the arithmetic.

Symmetric, one float32 scale per output channel. Norms, router, embedding and head stay as they
are, as in the official recipe's exclusion list (MiniMax-01 repository, quanto int8).
"""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from mmx.config import ModelConfig
from mmx.errors import UserError
from mmx.model import param_specs
from mmx.nn.params import ParamSpec
from mmx.sharding.rules import turned_specs
from pallas_kernels.int8_product.api import matrices_fit
from pallas_kernels.quantized import QuantizedTensor, TurnedTensor, dequantize

INT8 = "int8"
_MAX = np.float32(127)
_STEP = np.float32(1) / _MAX  # multiplied by, since compilers turn a constant division into that

# Axes that a layer's product sums over, repeats counted as axis 0.
_CONTRACTED = {
    "attn/qkv": (1,), "attn/gate": (1,), "attn/q": (1,), "attn/k": (1,), "attn/v": (1,),
    "attn/out": (1, 2), "moe/gate_up": (3,), "moe/down": (2,),
}


def check_mode(quantize: str | None):
    """Raises UserError unless `quantize` is None or "int8"."""
    if quantize not in (None, INT8):
        raise UserError(f"quantize={quantize!r} is unknown.", f"It is None or '{INT8}'.",
                        f"Use quantize='{INT8}', or leave it out.")


def contracted_axes(path: str) -> tuple[int, ...]:
    """Axes of the parameter at `path` with scale size 1; empty where it is never quantised."""
    return _CONTRACTED.get("/".join(path.split("/")[3:]), ())


def quantize_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantises a float matrix by its rows: (int8 values, float32 scales [rows, 1]).

    A row of zeros gets scale 1. A value that is not finite makes its scale so.
    """
    rows = rows.astype(np.float32)
    peak = np.maximum(rows.max(-1, keepdims=True), -rows.min(-1, keepdims=True))
    peak[peak == 0] = _MAX
    with np.errstate(invalid="ignore"):
        rows *= _MAX / peak
        return np.rint(rows, out=rows).astype(np.int8), peak * _STEP


@jax.jit(static_argnums=1)
def quantize(x: jax.Array, axes: tuple[int, ...]) -> QuantizedTensor:
    """Quantises `x` with one scale per channel, taken over `axes`; as `quantize_rows` does."""
    x = x.astype(jnp.float32)
    peak = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
    peak = jnp.where(peak == 0, _MAX, peak)
    return QuantizedTensor(jnp.rint(x * (_MAX / peak)).astype(jnp.int8), peak * _STEP)


def quantize_params(params: Mapping) -> dict:
    """Returns `params` with every matrix that the rules name as an int8 QuantizedTensor."""
    return {path: quantize(x, axes)
            if (axes := contracted_axes(path)) and not isinstance(x, QuantizedTensor | TurnedTensor)
            else x for path, x in params.items()}


def turns(spec: ParamSpec, sharding=None, turned: bool | None = None) -> bool:
    """Whether the parameter, in int8, lies as matrices [out, in]: the one place that decides it.

    By itself it does where a Hopper GPU's kernels then multiply integers, each device its own.

    Args:
      spec: of the parameter; its dtype is that of activations.
      sharding: of the plain parameter; one device if None.
      turned: False for none, True for all, on any device: to compare.
    """
    axes = contracted_axes(spec.path)
    if turned is False or not axes:
        return False
    shape = spec.shape
    if isinstance(sharding, NamedSharding):
        shape = sharding.shard_shape(shape)
    inner, outer = shape[axes[0]:axes[-1] + 1], shape[axes[-1] + 1:]
    return turned or matrices_fit(spec.dtype, math.prod(inner), math.prod(outer))


def turn(path: str, leaf: QuantizedTensor) -> TurnedTensor:
    """Returns the int8 leaf at `path` as matrices [out, in], on the same devices."""
    axes = contracted_axes(path)
    return _turn(leaf, axes, turned_sharding(leaf.values.sharding, leaf.shape, axes))


@jax.jit(static_argnums=(1, 2))
def _turn(leaf, axes, places):
    return jax.lax.with_sharding_constraint(TurnedTensor.of(leaf, axes), places)


def turned_sharding(sharding, shape: Sequence[int], axes: tuple[int, ...]) -> TurnedTensor:
    """Shardings of a turned leaf whose plain values, of `shape`, lie by `sharding`."""
    values = scale = sharding
    if isinstance(sharding, NamedSharding):
        values, scale = (
            NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
            for spec in turned_specs(sharding.spec, len(shape), axes[0], len(axes)))
    inner, outer = shape[axes[0]:axes[-1] + 1], shape[axes[-1] + 1:]
    return TurnedTensor(values, scale, tuple(inner[1:]), tuple(outer[1:]))


def lay(specs: Mapping[str, ParamSpec], params: dict, turned: bool | None = None) -> dict:
    """Turns the int8 leaves of `params` as `turns` says, in their dict, and returns it.

    One at a time is held both ways.
    """
    for path in params:
        leaf = params[path]
        if isinstance(leaf, QuantizedTensor) and turns(specs[path], leaf.values.sharding, turned):
            params[path] = leaf = jax.block_until_ready(turn(path, leaf))
    return params


def turned_back(params: Mapping) -> dict:
    """Returns `params` with turned leaves as the QuantizedTensors that checkpoints hold."""
    return {path: _plain(x) if isinstance(x, TurnedTensor) else x for path, x in params.items()}


_plain = jax.jit(TurnedTensor.plain)


def dequantize_params(params: Mapping, dtype) -> dict:
    """Returns `params` as plain arrays of `dtype`."""
    return {path: dequantize(x, dtype) for path, x in params.items()}


def abstract_params(config: ModelConfig, dtype="bfloat16", quantize: str | None = None) -> dict:
    """Shapes and dtypes of the parameters as loaded with `dtype` and `quantize`; no memory.

    int8 ones are QuantizedTensors, before any is turned.
    """
    check_mode(quantize)
    result = {}
    for path, spec in param_specs(config, dtype).items():
        axes = contracted_axes(path) if quantize else ()
        if not axes:
            result[path] = spec.abstract
            continue
        scale = tuple(1 if i in axes else n for i, n in enumerate(spec.shape))
        result[path] = QuantizedTensor(jax.ShapeDtypeStruct(spec.shape, jnp.int8),
                                       jax.ShapeDtypeStruct(scale, jnp.float32))
    return result
