"""Products with plain or int8 weights, embedding rows, RMSNorm."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from mmx.config import HEAD_DTYPE, ModelConfig
from mmx.nn.params import Factory, xavier
from mmx.nn.wide import Wide
from pallas_kernels import dispatch, precision
from pallas_kernels.grouped_matmul.stacked import Stacked
from pallas_kernels.int8_product.api import int8_product
from pallas_kernels.quantized import QuantizedTensor, TurnedTensor, dequantize


def project(spec: str, x: jax.Array, weight, out_dtype=None, activation=None) -> jax.Array:
    """Returns `einsum(spec, x, weight)` summed in float32, in x's dtype or `out_dtype`.

    An int8 weight enters the product as integers; its scale, constant over the contracted axes,
    is applied to the product. `activation` is applied last, elementwise.
    """
    if isinstance(weight, TurnedTensor | Stacked):
        return _by_turned(x, weight, out_dtype, activation)
    values = (weight.values if isinstance(weight, QuantizedTensor) else weight).astype(x.dtype)
    inputs, output = spec.split("->")
    left, right = inputs.split(",")
    kept = [i for i, letter in enumerate(right) if letter in output]
    scale = None
    if isinstance(weight, QuantizedTensor):
        scale = weight.scale.reshape([weight.scale.shape[i] for i in kept])
    shape = None
    if dispatch.platform() == "cpu" and _is_matrix_product(left, right, output):
        # XLA's CPU backend multiplies two matrices as they lie; with more axes it may transpose
        # the weight first, and it leaves elementwise loops over the small inner axes.
        inner, outer = len(right) - len(kept), x.shape[: len(output) - len(kept)]
        shape = (*outer, *values.shape[inner:])
        x = x.reshape(math.prod(outer), -1)
        values = values.reshape(math.prod(values.shape[:inner]), -1)
        scale = None if scale is None else scale.reshape(-1)
        spec = "xk,ky->xy"
    out = jnp.einsum(
        spec,
        x,
        values,
        precision=precision.for_dtype(x.dtype),
        preferred_element_type=jnp.float32,
    )
    if scale is not None:
        out = out * scale
    out = out.astype(out_dtype or x.dtype)
    if activation is not None:
        out = activation(out)
    return out if shape is None else out.reshape(shape)


def _by_turned(x, weight, out_dtype, activation):
    """As `project`: all of a turned weight's inner axes end x, and are summed over."""
    own = weight.whole if isinstance(weight, Stacked) else weight
    rows = x.shape[: x.ndim - len(own.inner)]
    if len(own.inner) > 1:
        # Heads end in norm and gate: left to XLA, each reader of the rows would make them anew out
        # of the gate's columns (one token on an H200: 20 us of a layer's 300).
        x = jax.lax.optimization_barrier(x)
    out = int8_product(x.reshape(-1, math.prod(own.inner)), weight)
    out = out.reshape(*rows, *own.outer).astype(out_dtype or x.dtype)
    return out if activation is None else activation(out)


def _is_matrix_product(left: str, right: str, output: str) -> bool:
    """True if the contracted axes end the left operand, lead the right one, and none is shared."""
    if "." in left:
        return False
    inner = "".join(letter for letter in right if letter not in output)
    return (
        left.endswith(inner)
        and right.startswith(inner)
        and output == left[: len(left) - len(inner)] + right[len(inner) :]
    )


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the trailing axes that its weight spans."""

    def __init__(self, shape: tuple[int, ...], axes, eps: float, make: Factory):
        self.weight = make.param("weight", shape, axes, "ones")
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Statistics in float32; the weight multiplies after the cast back (official order)."""
        weight = self.weight[...]
        over = tuple(range(-weight.ndim, 0))
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=over, keepdims=True) + self.eps)
        return x32.astype(x.dtype) * weight.astype(x.dtype)


class Embedding(nnx.Module):
    """Token embedding: rows, not scaled, no positions."""

    def __init__(self, config: ModelConfig, make: Factory):
        V, D = config.vocab_size, config.hidden_size
        # Unit variance after the first norm whatever the scale, so the release's 0.02 is kept.
        self.weight = make.param(
            "weight", (V, D), ("vocab", "embed"), f"normal:{config.initializer_range!r}"
        )

    def __call__(self, ids_BT: jax.Array, dtype) -> jax.Array:
        return jnp.take(dequantize(self.weight[...], dtype), ids_BT, axis=0, mode="clip")


class Head(nnx.Module):
    """Output projection to the vocabulary, summed in float32."""

    def __init__(self, config: ModelConfig, make: Factory):
        V, D = config.vocab_size, config.hidden_size
        self.weight = make.param("weight", (V, D), ("vocab", "embed"), xavier(D, V))

    def __call__(self, x: jax.Array) -> jax.Array:
        weight = self.weight[...]
        if isinstance(weight, Wide):
            return project("...d,dv->...v", x, weight.values, HEAD_DTYPE)
        return project("...d,vd->...v", x, weight, HEAD_DTYPE)
