"""Products with plain or int8 weights, embedding rows, RMSNorm."""

import jax
import jax.numpy as jnp
from flax import nnx

from mmx.config import HEAD_DTYPE, ModelConfig
from mmx.nn.params import Factory, xavier
from pallas_kernels import precision
from pallas_kernels.quantized import QuantizedTensor, dequantize


def project(spec: str, x: jax.Array, weight, out_dtype=None) -> jax.Array:
    """Returns `einsum(spec, x, weight)` summed in float32, in x's dtype or `out_dtype`.

    An int8 weight enters the product as integers; its scale, constant over the contracted axes,
    is applied to the product.
    """
    values = weight.values if isinstance(weight, QuantizedTensor) else weight
    out = jnp.einsum(
        spec,
        x,
        values.astype(x.dtype),
        precision=precision.for_dtype(x.dtype),
        preferred_element_type=jnp.float32,
    )
    if isinstance(weight, QuantizedTensor):
        inputs, output = spec.split("->")
        letters = inputs.split(",")[1]
        kept = [i for i, letter in enumerate(letters) if letter in output]
        out = out * weight.scale.reshape([weight.scale.shape[i] for i in kept])
    return out.astype(out_dtype or x.dtype)


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
        return project("...d,vd->...v", x, self.weight[...], HEAD_DTYPE)
