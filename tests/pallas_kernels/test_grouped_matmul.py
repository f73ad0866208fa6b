"""Grouped matrix product: every form against a float64 loop, empty groups and all."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx.quant import quantize
from pallas_kernels import grouped_matmul
from pallas_kernels.grouped_matmul.api import grouped_swiglu
from pallas_kernels.grouped_matmul.stacked import Stacked
from pallas_kernels.quantized import QuantizedTensor, TurnedTensor
from tests.tolerances import assert_close

M, D, F, E = 300, 24, 40, 5
SIZES = {
    "even": (60,) * E, "empty groups": (0, 200, 0, 100, 0), "all in one": (0, 0, M, 0, 0),
    "first and last": (1, 0, 0, 0, 299), "rows left over": (10, 0, 128, 1, 0), "none": (0,) * E,
    "tile edges": (128, 0, 129, 43, 0),
    "skewed": tuple(np.random.default_rng(2).multinomial(
        M, np.random.default_rng(2).dirichlet(np.full(E, 0.3))).tolist())}
NAMES = ("reference", "ragged_dot", "tiled", "megablox", "pallas_tpu", None)
forms = {name: jax.jit(partial(grouped_matmul, implementation=name)) for name in NAMES}


def draw(dtype="float32", rows=M):
    rng = np.random.default_rng(0)
    return (jnp.asarray(rng.standard_normal((rows, D)), dtype),
            jnp.asarray(rng.standard_normal((E, D, F)), dtype))


def expected(x, w, sizes):
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    out, first = np.zeros((len(x), w.shape[2])), 0
    for e, size in enumerate(sizes):
        out[first:first + size] = x[first:first + size] @ w[e]
        first += size
    return out


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("form", NAMES, ids=str)
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_every_form(sizes, form, dtype):
    x, w = draw(dtype)
    got = forms[form](x, w, jnp.array(sizes))
    assert got.dtype == x.dtype
    assert_close(got, expected(x, w, sizes), "kernel", dtype, str(form))


@pytest.mark.parametrize("form", NAMES, ids=str)
def test_few_rows(form):
    x, w = draw(rows=9)
    sizes = (2, 0, 0, 7, 0)
    assert_close(forms[form](x, w, jnp.array(sizes)), expected(x, w, sizes), "kernel", "float32")


@partial(jax.jit, static_argnames="form")
def gradients(x, w, sizes, weight, form):
    def scalar(x, w):
        return jnp.vdot(grouped_matmul(x, w, sizes, implementation=form), weight)

    return jax.grad(scalar, argnums=(0, 1))(x, w)


@pytest.mark.parametrize("form", ("ragged_dot", "tiled", "megablox", "pallas_tpu"))
@pytest.mark.parametrize("name", ("empty groups", "rows left over"))
def test_gradients_equal_the_reference(form, name):
    x, w = draw()
    weight = jnp.asarray(np.random.default_rng(1).standard_normal((M, F)), jnp.float32)
    sizes = jnp.array(SIZES[name])
    pairs = zip(gradients(x, w, sizes, weight, form),
                gradients(x, w, sizes, weight, "reference"), strict=True)
    for have, want in pairs:
        assert_close(have, want, "gradient", "float32", form)


@pytest.mark.parametrize("form", NAMES, ids=str)
def test_int8_weights_equal_their_dequantised_product(form):
    x, w = draw()
    scale = np.abs(np.asarray(w)).max(axis=1, keepdims=True) / 127
    values = np.rint(np.asarray(w) / scale).astype(np.int8)
    quantised = QuantizedTensor(jnp.asarray(values), jnp.asarray(scale, jnp.float32))
    sizes = SIZES["empty groups"]
    got = forms[form](x, quantised, jnp.array(sizes))
    assert_close(got, expected(x, values * scale, sizes), "kernel", "float32", str(form))


@pytest.mark.parametrize("name", ["tiled", "ragged_dot"])
def test_turned_int8_weights_give_the_same_to_the_bit(name):
    x, w = draw()
    plain = quantize(jnp.stack([w, w[::-1]]), (2,))
    turned, sizes = TurnedTensor.of(plain, (2,)), jnp.array(SIZES["empty groups"])
    for run, one in ((grouped_swiglu, lambda leaf: leaf),
                     (grouped_matmul, lambda leaf: jax.tree.map(lambda x: x[1], leaf)),
                     (grouped_matmul, lambda leaf: Stacked(leaf, jnp.int32(1)))):
        got, want = (run(x, one(leaf), sizes, implementation=name) for leaf in (turned, plain))
        assert (np.asarray(got) == np.asarray(want)).all()


def test_named_implementation_works_or_raises():
    x, w = draw()
    with pytest.raises(ValueError, match=r"no implementation 'cutlass'.*ragged_dot, reference"):
        grouped_matmul(x, w, jnp.array(SIZES["even"]), implementation="cutlass")


def test_arguments_that_do_not_fit_are_refused():
    x, w = draw()
    with pytest.raises(ValueError, match="share D"):
        grouped_matmul(x[:, :3], w, jnp.array(SIZES["even"]))
    with pytest.raises(ValueError, match="group_sizes_E must have shape"):
        grouped_matmul(x, w, jnp.array([1, 2]))
