"""int8 matrices laid [out, in]: their forms, and the Hopper kernel interpreted and compiled."""

import dataclasses
import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from mmx.quant import contracted_axes, quantize, turn
from pallas_kernels import tuning
from pallas_kernels.grouped_matmul.stacked import Stacked, cut
from pallas_kernels.int8_product.api import int8_product
from pallas_kernels.int8_product.rows import MOST, two_parts
from pallas_kernels.quantized import QuantizedTensor, TurnedTensor, dequantize
from tests.pallas_kernels import hopper
from tests.tolerances import assert_close, bound

INTERPRETED = ["rows/128", "rows/384", "rows/1024", "dense/1", "dense/33", "dense/70"] + [
    f"{what}/{kind}" for what in ("experts", "one_pass")
    for kind in ("even", "skewed", "nobody", "one_token", "one_nobody")] + ["narrow/skewed"]
COMPILED = [f"{what}/{T}" for what in ("dense", "experts") for T in (1, 64, 256)]


def weight(shape=(3, 4, 32, 8), axes=(1, 2), seed=0):
    return quantize(jnp.asarray(np.random.default_rng(seed).standard_normal(shape)), axes)


@pytest.mark.parametrize("shape, axes", [((3, 24, 2, 8), (1,)), ((3, 4, 6, 8), (1, 2)),
                                         ((3, 2, 4, 6, 8), (3,)), ((6, 8), (0,))], ids=str)
def test_turning_there_and_back(shape, axes):
    plain = weight(shape, axes)
    turned = TurnedTensor.of(plain, axes)
    assert turned.shape == shape and turned.ndim == len(shape) and turned.nbytes == plain.nbytes
    back = turned.plain()
    assert (back.values == plain.values).all() and (back.scale == plain.scale).all()
    assert (dequantize(turned, jnp.float32) == dequantize(plain, jnp.float32)).all()


def test_a_place_in_a_stack_is_cut():
    plain = weight()
    one = cut(Stacked(TurnedTensor.of(plain, (1, 2)), jnp.int32(1)))
    assert (dequantize(one, jnp.float32) == dequantize(plain, jnp.float32)[1]).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_xla_equals_float64(dtype):
    plain = weight()
    x = jnp.asarray(np.random.default_rng(1).standard_normal((5, 128)), dtype)
    got = int8_product(x, Stacked(TurnedTensor.of(plain, (1, 2)), jnp.int32(2)))
    whole = np.asarray(plain.values[2], np.float64) * np.asarray(plain.scale[2])
    assert_close(got, np.asarray(x, np.float64) @ whole.reshape(128, 8), "kernel", dtype)


def test_two_parts_hold_fifteen_bits_of_a_row():
    x = np.random.default_rng(0).standard_normal((7, 300)) * 10.0 ** np.arange(-3, 4)[:, None]
    x[2] = 0
    x = jnp.asarray(x, jnp.bfloat16)
    (high, low), peak_M = two_parts(x)
    assert high.dtype == low.dtype == jnp.int8
    back = (128.0 * np.asarray(high, np.float64) + np.asarray(low)) / MOST
    back *= np.asarray(peak_M, np.float64)[:, None]
    peak = np.abs(np.asarray(x, np.float64)).max(axis=1, keepdims=True)
    # Half a unit of the last place, of which 127 · 128 + 63 make the largest value, and what
    # float32 adds to the division.
    assert (np.abs(back - np.asarray(x, np.float64)) <= peak * 0.502 / 16319).all()
    assert not np.asarray(low)[2].any() and not np.asarray(high)[2].any()


def test_a_row_that_is_not_finite_stays_so():
    x = jnp.ones((2, 128), jnp.bfloat16).at[0, 3].set(jnp.nan)
    _, peak_M = two_parts(x)
    assert np.isnan(peak_M[0]) and np.isfinite(peak_M[1])


def test_rows_too_small_to_have_an_inverse_stay_small():
    # float32's largest number over 127 · 128 + 63: smaller peaks make infinite steps.
    x = jnp.full((1, 128), 1e-36, jnp.float32).at[0, 5].set(0)
    (high, low), peak_M = two_parts(x)
    back = (128.0 * np.asarray(high, np.float64) + np.asarray(low)) / MOST * float(peak_M[0])
    assert np.abs(back).max() <= 1.01e-36


def test_the_paths_that_are_quantised_turn():
    for name in ("attn/qkv", "attn/out", "moe/gate_up", "moe/down"):
        path = f"stack/0/0/{name}"
        axes = contracted_axes(path)
        shape = (2, *range(3, 3 + axes[-1]), 6)
        plain = weight(shape, axes)
        values = np.asarray(plain.values)
        turned = turn(path, plain)
        assert turned.shape == shape and (np.asarray(turned.plain().values) == values).all()


@pytest.mark.parametrize("x, message", [
    (jnp.zeros((2, 64)), r"x must be \[M, 128\]"), (jnp.zeros((2, 128)), "this is a cpu")], ids=str)
def test_what_does_not_fit_is_refused(x, message):
    with pytest.raises(ValueError, match=message):
        int8_product(x, cut(Stacked(TurnedTensor.of(weight(), (1, 2)), jnp.int32(0))),
                     implementation="mosaic_gpu")


@pytest.mark.parametrize("dtype, shape, message", [
    ("float32", (128, 128), "rows of float32"), ("bfloat16", (128, 192), "multiples of 128")],
    ids=str)
def test_what_the_kernel_does_not_take_is_refused(dtype, shape, message):
    from pallas_kernels.int8_product import api

    turned = TurnedTensor.of(weight(shape, (0,)), (0,))
    with pytest.raises(ValueError, match=message):
        api._mosaic_gpu(jnp.zeros((2, 128), dtype), turned, interpret=True)


@pytest.mark.parametrize("rows, dtype, shape, taken", [
    (1, "bfloat16", (128, 256), True), (256, "bfloat16", (128, 256), True),
    (257, "bfloat16", (128, 256), False), (1, "float32", (128, 256), False),
    (1, "bfloat16", (128, 192), False), (1, "bfloat16", (64, 256), False)], ids=str)
def test_the_kernel_is_the_choice_on_hopper_where_it_fits(monkeypatch, rows, dtype, shape, taken):
    from pallas_kernels.int8_product import api

    called = []
    for name in ("_xla", "_mosaic_gpu"):
        monkeypatch.setattr(api, name, lambda x, weight, name=name: called.append(name))
    turned = TurnedTensor.of(weight(shape, (0,)), (0,))
    int8_product(jnp.zeros((rows, shape[0]), dtype), turned)  # on a CPU
    monkeypatch.setattr(tuning, "hopper", lambda: True)
    int8_product(jnp.zeros((rows, shape[0]), dtype), turned)
    assert called == ["_xla", "_mosaic_gpu" if taken else "_xla"]


def test_a_part_of_a_leaf_knows_its_own_sizes():
    """What one of four devices holds, by its share of the first axes."""
    plain = weight((3, 4, 6, 8, 2), (1, 2))
    turned = TurnedTensor.of(plain, (1, 2))
    part = dataclasses.replace(turned, values=turned.values[:, :8, :12], scale=turned.scale[:, :8])
    assert part.shape == (3, 2, 6, 4, 2)
    assert (part.plain().values == plain.values[:, :2, :, :4]).all()
    assert (part.plain().scale == plain.scale[:, :, :, :4]).all()


work = partial(hopper.work, "int8_product_worker")


@pytest.fixture(scope="module")
def interpreted():
    if not hasattr(plgpu, "InterpretGPUParams"):
        pytest.skip("the GPU interpreter came with jax 0.11")
    return json.loads(work("interpret", INTERPRETED).splitlines()[-1])


@pytest.mark.parametrize("case", INTERPRETED)
def test_interpreted_equals_the_reference(interpreted, case):
    assert interpreted[case] <= bound("kernel", jnp.bfloat16)


@pytest.mark.gpu_aot
def test_compiles_for_h200_without_spills_or_copies_of_weights():
    output = work("compile", COMPILED, MOSAIC_GPU_DUMP_PTXAS="1")
    spills = [int(x) for x in re.findall(r"(\d+) bytes spill", output)]
    assert len(spills) >= 2 * 3 * 3 and not any(spills)
    temporary = json.loads(output.splitlines()[-1])
    # Rows and hidden activations, where one expert has 170 MB and qkv 151.
    assert all(size < 120 << 20 for size in temporary.values()), temporary


def test_a_model_of_turned_weights_gives_the_same_logits():
    from mmx import model
    from mmx.quant import quantize_params
    from tests import tiny

    config = tiny.config(2, 2)
    params = quantize_params(model.init_params(config, jax.random.key(0)))
    turned = {path: TurnedTensor.of(leaf, contracted_axes(path))
              if isinstance(leaf, QuantizedTensor) else leaf for path, leaf in params.items()}
    assert any(isinstance(leaf, TurnedTensor) for leaf in turned.values())
    ids = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (2, 9)), jnp.int32)
    got, want = (model.forward(config, p, ids)[0] for p in (turned, params))
    assert_close(got, want, "split")


@pytest.mark.parametrize("stacked", [False, True], ids=["alone", "in a stack"])
@pytest.mark.parametrize("name", ["sliced", "gather", "dense", "grouped", "tiled", "filled"])
def test_every_form_of_experts_takes_turned_weights(name, stacked):
    from mmx.nn import experts

    rng = np.random.default_rng(0)
    E, D, F, T = 4, 16, 24, 6
    leaves = weight((2, 2, E, D, F), (3,)), weight((2, E, F, D), (2,), seed=1)
    g = jnp.asarray(rng.standard_normal((T, D)), jnp.float32)
    share = jnp.asarray(rng.dirichlet(np.ones(2), T), jnp.float32)
    expert = jnp.asarray([rng.permutation(E)[:2] for _ in range(T)], jnp.int32)

    def run(leaves):
        given = [Stacked(leaf, jnp.int32(1)) for leaf in leaves]
        return experts.apply(name, True, g, share, expert, *(
            given if stacked else map(cut, given)))

    turned = [TurnedTensor.of(leaf, (axis,)) for leaf, axis in zip(leaves, (3, 2), strict=True)]
    assert (np.asarray(run(turned)) == np.asarray(run(leaves))).all()
