"""What grouped kernels have beyond the common product: pairs, stacks, tiles, races, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, grouped_matmul
from pallas_kernels.grouped_matmul import mosaic_gpu, pallas_tpu, tiles
from pallas_kernels.grouped_matmul.api import grouped_swiglu
from pallas_kernels.grouped_matmul.stacked import Stacked, cut
from pallas_kernels.quantized import QuantizedTensor
from tests.tolerances import assert_close

M, D, F, E = 300, 64, 300, 5
SIZES = {"skewed": (5, 0, 201, 13, 60), "rows left over": (10, 0, 128, 1, 0), "none": (0,) * E}


def draw(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape) / np.sqrt(shape[-2])


def quantise(w):
    scale = np.abs(w).max(axis=-2, keepdims=True) / 127
    values = np.rint(w / scale).astype(np.int8)
    return QuantizedTensor(jnp.asarray(values), jnp.asarray(scale, jnp.float32)), values * scale


def stack(weight, index):
    """`weight` as layer `index` of three, between layers of ones."""
    whole = jax.tree.map(
        lambda leaf: jnp.ones((3, *leaf.shape), leaf.dtype).at[index].set(leaf), weight)
    return Stacked(whole, jnp.int32(index))


def expected(x, w, sizes):
    x, out, first = np.asarray(x, np.float64), np.zeros((len(x), w.shape[-1])), 0
    for e, size in enumerate(sizes):
        out[first:first + size] = x[first:first + size] @ w[e]
        first += size
    return out


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.fixture
def narrow_tiles(monkeypatch):
    """So little memory that 300 columns take three tiles, the last one cut."""
    monkeypatch.setattr(tiles, "vmem_bytes", lambda: 600 << 10)
    got = pallas_tpu.tile_sizes(M, 1, E, D, F, jnp.float32, jnp.float32)
    assert got[1] == 128


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("kind", ("plain", "int8"))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_gate_and_up_in_one_product(sizes, kind, dtype):
    x = jnp.asarray(draw((M, D)) * 8, dtype)
    w, exact = quantise(draw((2, E, D, F)))
    if kind == "plain":
        w = jnp.asarray(draw((2, E, D, F)), dtype)
        exact = np.asarray(w, np.float64)
    inside = sum(sizes)
    wanted = silu(expected(x, exact[0], sizes)) * expected(x, exact[1], sizes)
    for form in ("pallas_tpu", "tiled"):
        got = grouped_swiglu(x, w, jnp.array(sizes), implementation=form)
        assert got.dtype == x.dtype
        assert_close(got[:inside], wanted[:inside], "kernel", dtype, form)


@pytest.mark.parametrize("form", ("pallas_tpu", "megablox", "tiled"))
def test_weights_inside_a_stack(form, narrow_tiles):
    x, sizes = jnp.asarray(draw((M, D)), jnp.float32), SIZES["skewed"]
    for w in (jnp.asarray(draw((E, D, F)), jnp.float32), quantise(draw((E, D, F)))[0]):
        laid = stack(w, 1)
        assert laid.shape == w.shape and laid.ndim == 3 and laid.dtype == w.dtype
        assert laid[...] is laid
        jax.tree.map(np.testing.assert_array_equal, cut(laid), w)
        got, want = (jax.jit(lambda x, w: grouped_matmul(
            x, w, jnp.array(sizes), implementation=form))(x, weight) for weight in (laid, w))
        np.testing.assert_array_equal(got, want)


def test_a_stack_has_no_gradient():
    x, w = jnp.asarray(draw((M, D)), jnp.float32), jnp.asarray(draw((E, D, F)), jnp.float32)
    with pytest.raises(ValueError, match="`cut` them in training"):
        jax.grad(lambda x: grouped_matmul(x, stack(w, 0), jnp.array(SIZES["skewed"]),
                                          implementation="pallas_tpu").sum())(x)
    with pytest.raises(TypeError, match="`cut` it"):
        stack(w, 0)[0]


def test_int8_weights_pass_a_gradient_to_the_rows():
    x, sizes = jnp.asarray(draw((M, D)), jnp.float32), jnp.array(SIZES["skewed"])
    w, exact = quantise(draw((E, D, F)))
    u = jnp.asarray(draw((M, F), seed=1), jnp.float32)

    def scalar(x, w, form):
        return jnp.vdot(grouped_matmul(x, w, sizes, implementation=form), u)

    got = jax.grad(scalar)(x, w, "pallas_tpu")
    want = jax.grad(scalar)(x, jnp.asarray(exact, jnp.float32), "reference")
    assert_close(got, want, "gradient")


@pytest.mark.parametrize("kind", ("plain", "int8"))
def test_no_races_nothing_read_out_of_bounds(kind, narrow_tiles):
    x, sizes = jnp.asarray(draw((M, D)), jnp.float32), SIZES["skewed"]
    w, exact = quantise(draw((E, D, F)))
    if kind == "plain":
        w = jnp.asarray(exact, jnp.float32)
    got = pallas_tpu.grouped_matmul(
        x, w, jnp.array(sizes), interpret=pltpu.InterpretParams(detect_races=True))
    assert_close(got, expected(x, exact, sizes), "kernel")
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
    assert not interpreter.races.races_found


@pytest.mark.parametrize("seed", range(8))
def test_visits_cover_every_row_once_in_order(seed):
    rng = np.random.default_rng(seed)
    groups, tile = int(rng.integers(1, 9)), int(rng.choice([8, 16, 128]))
    rows = int(rng.integers(1, 500))
    sizes = rng.multinomial(rows, rng.dirichlet(np.full(groups, 0.3)))
    sizes[-1] = rng.integers(0, sizes[-1] + 1)
    plan = pallas_tpu.visits(jnp.array(sizes), rows, tile)
    total = int(plan.total[0])
    assert total <= len(plan.group_V) == -(-rows // tile) + groups - 1
    assert np.all(np.diff(plan.tile_V) >= 0) and np.all(np.diff(plan.group_V) >= 0)
    owner = np.full(rows, -1)
    for group, place in zip(plan.group_V[:total], plan.tile_V[:total], strict=True):
        mine = slice(max(place * tile, plan.starts[group]),
                     min((place + 1) * tile, plan.starts[group + 1]))
        assert np.all(owner[mine] == -1)
        owner[mine] = group
    np.testing.assert_array_equal(owner[:sum(sizes)], np.repeat(np.arange(groups), sizes))
    assert np.all(owner[sum(sizes):] == -1)
    # Steps beyond the last repeat its blocks, so that nothing is fetched for them.
    assert len(set(plan.group_V[max(total - 1, 0):].tolist())) == 1
    assert len(set(plan.tile_V[max(total - 1, 0):].tolist())) == 1


@pytest.mark.parametrize("columns, most, room, wanted", [
    (9216, 512, 1 << 30, 512), (6144, 1024, 900 * 1000, 768), (576, 512, 1 << 30, 512),
    (300, 512, 1 << 30, 300), (300, 512, 200 * 1000, 128), (1280, 1024, 1 << 30, 640)])
def test_column_tiles(columns, most, room, wanted):
    assert tiles.column_tile(columns, most, 1000, room) == wanted


def test_no_tile_is_a_sentence():
    with pytest.raises(ValueError, match="128 columns needs 12 MiB .* where 5 are left"):
        tiles.column_tile(4096, 512, 100_000, 5 << 20)


def test_listed_tiles_hold_from_their_rows_on(monkeypatch):
    monkeypatch.setattr(tiles.tuning, "chip", lambda: "v6e")
    few, many = (tiles.listed("pallas_tpu", rows, 6144, 2 * 9216) for rows in (64, 65536))
    assert few["rows"] < many["rows"]
    monkeypatch.setattr(tiles.tuning, "chip", lambda: "v4")
    assert tiles.listed("pallas_tpu", 64, 6144, 2 * 9216)["columns"] == 128
    assert tiles.listed("pallas_tpu", 64, 6144, 7) is None


def test_automatic_choice_by_platform(monkeypatch):
    chosen = []
    monkeypatch.setattr(dispatch, "_log_choice", lambda op, name, shape: chosen.append(name))
    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((64, 128), (4, 128, 256)))
    int8 = QuantizedTensor(jax.ShapeDtypeStruct((4, 128, 256), jnp.int8),
                           jax.ShapeDtypeStruct((4, 1, 256), jnp.float32))
    sizes = jax.ShapeDtypeStruct((4,), jnp.int32)
    for platform in ("tpu", "gpu", "cpu"):
        with dispatch.compiling_for(platform):
            for given in ((x, w), (x, int8), (jax.tree.map(
                    lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32), (x, w)))):
                jax.eval_shape(lambda x, w, s: grouped_matmul(x, w, s), *given, sizes)
    assert chosen == ["megablox", "pallas_tpu", "ragged_dot", *["ragged_dot"] * 3, *["tiled"] * 3]


def test_kernels_of_another_platform_are_refused():
    x, w = jnp.asarray(draw((M, D)), jnp.bfloat16), jnp.asarray(draw((E, D, 128)), jnp.bfloat16)
    sizes = jnp.array(SIZES["skewed"])
    with pytest.raises(ValueError, match="'mosaic_gpu' runs on an NVIDIA GPU"):
        grouped_matmul(x, w, sizes, implementation="mosaic_gpu")
    with dispatch.compiling_for("gpu"):
        for name in ("megablox", "pallas_tpu"):
            with pytest.raises(ValueError, match=f"'{name}' runs on a TPU"):
                grouped_matmul(x, w, sizes, implementation=name)
        with pytest.raises(ValueError, match="'pallas_tpu' runs on a TPU"):
            grouped_swiglu(x, w[None].repeat(2, 0), sizes, implementation="pallas_tpu")
        with pytest.raises(ValueError, match="Both must be bfloat16"):
            mosaic_gpu.grouped_matmul(x.astype(jnp.float32), w, sizes)
        with pytest.raises(ValueError, match="multiples of 64"):
            mosaic_gpu.grouped_matmul(x, w[..., :100], sizes)
    with pytest.raises(ValueError, match=r"must be \[2, E, D, F\]"):
        grouped_swiglu(x, w, sizes)


@pytest.mark.parametrize("shape", (("6144x9216"), ("9216x6144")))
def test_listed_gpu_tiles_fit_shared_memory_and_the_shape(shape):
    inner, columns = map(int, shape.split("x"))
    for rows in (64, 4096, 65536):
        sizes = mosaic_gpu.tile_sizes(rows, 32, inner, columns)
        m, n, k = sizes["block_m"], sizes["block_n"], sizes["block_k"]
        shared = 2 * (sizes["max_concurrent_steps"] * k * (m + n) + m * n)
        assert shared <= 227 << 10
        assert inner % k == 0 and columns % (n * sizes["grid_block_n"]) == 0
