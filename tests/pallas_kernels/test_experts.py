"""Experts of a decode step in one kernel, and all forms of the experts' sum against it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from mmx.nn import experts
from pallas_kernels import dispatch
from pallas_kernels.experts import hit_pallas_tpu, reference
from pallas_kernels.experts.api import hit_experts
from pallas_kernels.grouped_matmul import tiles
from pallas_kernels.grouped_matmul.stacked import Stacked
from pallas_kernels.quantized import QuantizedTensor
from tests.tolerances import assert_close

D, F, E, K = 64, 300, 8, 2
ROUTERS = ("even", "skewed", "one", "nobody", "some nobody")


def route(kind, T, seed=0):
    """Weights and ids of T tokens; ids of E are of nobody."""
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.full(E, 0.2 if kind == "skewed" else 100.0))
    share = (share + 1e-6) / (share + 1e-6).sum()
    expert = np.stack([rng.choice(E, K, replace=False, p=share) for _ in range(T)])
    weight = rng.dirichlet(np.ones(K), size=T)
    if kind == "one":
        expert[:] = (3, 5)
    if kind == "nobody":
        expert[:] = E
    if kind == "some nobody":
        expert[rng.random((T, K)) < 0.7] = E
    weight[expert == E] = 0
    return jnp.asarray(weight, jnp.float32), jnp.asarray(expert, jnp.int32)


def draw(dtype, kind, T=5, width=F):
    rng = np.random.default_rng(1)
    g = jnp.asarray(rng.standard_normal((T, D)), dtype)
    gate_up = rng.standard_normal((2, E, D, width)) / np.sqrt(D)
    down = rng.standard_normal((E, width, D)) / np.sqrt(width)
    if kind == "plain":
        return g, jnp.asarray(gate_up, dtype), jnp.asarray(down, dtype)
    return g, quantise(gate_up), quantise(down)


def quantise(w):
    scale = np.abs(w).max(axis=-2, keepdims=True) / 127
    return QuantizedTensor(jnp.asarray(np.rint(w / scale), jnp.int8),
                           jnp.asarray(scale, jnp.float32))


@pytest.fixture
def narrow_tiles(monkeypatch):
    """So little memory that a width of 300 takes three tiles, the last one cut."""
    monkeypatch.setattr(tiles, "vmem_bytes", lambda: 400 << 10)
    assert hit_pallas_tpu.tile_size(5, D, F, jnp.float32, jnp.float32) == 128


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("kind", ("plain", "int8"))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_kernel_equals_the_reference(router, kind, dtype, narrow_tiles):
    g, gate_up, down = draw(dtype, kind)
    weight, expert = route(router, len(g))
    got = hit_experts(g, weight, expert, gate_up, down, implementation="pallas_tpu")
    assert got.dtype == jnp.float32 and got.shape == g.shape
    want = reference.experts(g, weight, expert, gate_up, down)
    assert_close(got, want, "kernel", dtype, router)


@pytest.mark.parametrize("T, width", ((1, 384), (17, 128)))
def test_any_number_of_tokens_and_tiles(T, width, narrow_tiles):
    g, gate_up, down = draw("float32", "plain", T, width)
    weight, expert = route("even", T)
    got = hit_experts(g, weight, expert, gate_up, down, implementation="pallas_tpu")
    assert_close(got, reference.experts(g, weight, expert, gate_up, down), "kernel")


@pytest.mark.parametrize("kind", ("plain", "int8"))
def test_no_races_nothing_read_out_of_bounds(kind, narrow_tiles):
    g, gate_up, down = draw("float32", kind)
    weight, expert = route("some nobody", len(g))
    got = hit_pallas_tpu.hit_experts(
        g, weight, expert, gate_up, down, interpret=pltpu.InterpretParams(detect_races=True))
    assert_close(got, reference.experts(g, weight, expert, gate_up, down), "kernel")
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call
    assert not interpret_pallas_call.races.races_found


def test_experts_that_are_not_hit_are_never_read(narrow_tiles):
    """Their matrices are NaN: even zero times them would show."""
    g, gate_up, down = draw("float32", "plain")
    weight, expert = route("skewed", len(g))
    hit = np.isin(np.arange(E), expert)
    assert 0 < hit.sum() < E
    want = reference.experts(g, weight, expert, gate_up, down)
    got = hit_experts(g, weight, expert, jnp.where(hit[:, None, None], gate_up, jnp.nan),
                      jnp.where(hit[:, None, None], down, jnp.nan), implementation="pallas_tpu")
    assert_close(got, want, "kernel")


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("T", (1, 3, 20))
def test_hit_list(router, T):
    expert = route(router, T)[1]
    hits, count = hit_pallas_tpu.hit_list(expert, E)
    wanted = sorted(set(np.asarray(expert).ravel().tolist()) - {E})
    assert hits.shape == (min(T * K, E),) and int(count[0]) == len(wanted)
    assert hits[:len(wanted)].tolist() == wanted
    # Behind the last hit expert the list stands still.
    assert len(set(hits[max(len(wanted) - 1, 0):].tolist())) == 1


def blocks_fetched(T, expert, tile):
    """Blocks of gate and up that the grid of the kernel names, in order, repeats left out."""
    seen = []

    def count(*block):
        if not seen or seen[-1] != block:
            seen.append(block)

    hits, hit = (np.asarray(x) for x in hit_pallas_tpu.hit_list(expert, E))
    tiles_F = -(-F // tile)
    for c in range(2):
        for h in range(len(hits)):
            for f in range(-(-tiles_F // 2)):
                count(*hit_pallas_tpu.up_block(c, h, f, (0,), hits, hit, F, tile))
    return [tuple(int(i) for i in block) for block in seen]


@pytest.mark.parametrize("router", ("even", "skewed", "one", "some nobody"))
def test_every_block_of_a_hit_expert_is_fetched_once_and_no_other(router):
    expert = route(router, 5)[1]
    fetched = blocks_fetched(5, expert, 128)
    hit = set(np.asarray(expert).ravel().tolist()) - {E}
    assert sorted(fetched) == sorted((0, 0, e, 0, f) for e in hit for f in range(3))


FORMS = ("sliced", "gather", "dense", "grouped", "tiled", "hit", "fused")
run = jax.jit(experts.apply, static_argnums=(0, 1))


@pytest.mark.parametrize("form", (*FORMS, "filled", None))
@pytest.mark.parametrize("kind", ("plain", "int8"))
@pytest.mark.parametrize("router", ("skewed", "some nobody"))
def test_all_forms_of_a_layer_agree(form, kind, router):
    g, gate_up, down = draw("float32", kind)
    weight, expert = route(router, len(g))
    want = reference.experts(g, weight, expert, gate_up, down)
    assert_close(run(form, True, g, weight, expert, gate_up, down), want, "kernel", what=str(form))


@pytest.mark.parametrize("form", (*FORMS, None))
def test_forms_take_weights_inside_a_stack(form):
    g, gate_up, down = draw("float32", "int8")
    weight, expert = route("skewed", len(g))
    laid = [Stacked(jax.tree.map(lambda leaf: jnp.stack([jnp.ones_like(leaf), leaf]), w),
                    jnp.int32(1)) for w in (gate_up, down)]
    np.testing.assert_array_equal(run(form, True, g, weight, expert, *laid),
                                  run(form, True, g, weight, expert, gate_up, down))


def test_choice_by_platform_and_tokens():
    both = ("hit", "fused")

    def names(platform, inference=True, **given):
        with dispatch.compiling_for(platform):
            return [experts.choose(T, 2, 32, 9216, inference, **given)
                    for T in (1, 8, 64, 128, 4096)]

    assert names("tpu", kernels=both, stacked=True) == ["hit"] * 4 + ["fused"]
    # Cut out of a stack they would be copied for a kernel; one product reads them in place.
    assert names("tpu", kernels=both) == ["dense"] * 4 + ["fused"]
    assert names("tpu", kernels=(), stacked=True) == ["dense"] * 4 + ["grouped"]
    assert names("tpu", inference=False, kernels=both) == ["dense"] * 4 + ["grouped"]
    assert names("gpu") == ["gather"] * 2 + ["grouped"] * 3
    assert names("cpu") == ["sliced"] * 2 + ["dense", "filled", "filled"]
    with dispatch.compiling_for("tpu"):
        assert experts.choose(4, 2, 8, 64, True, both, stacked=True) == "dense"


def test_gather_sums_in_float32():
    g, gate_up, down = draw("bfloat16", "plain")
    weight, expert = route("even", len(g))
    got = run("gather", True, g, weight, expert, gate_up, down)
    assert_close(got, reference.experts(g, weight, expert, gate_up, down), "kernel", "bfloat16")


def test_refusals():
    g, gate_up, down = draw("float32", "plain")
    weight, expert = route("even", len(g))
    with pytest.raises(ValueError, match=r"must be \[2, E, 64, F\]"):
        hit_experts(g, weight, expert, gate_up[:, :3], down)
    with pytest.raises(ValueError, match=r"must be \[5, k\]"):
        hit_experts(g, weight[:2], expert[:2], gate_up, down)
    with pytest.raises(ValueError, match="no implementation 'fast'"):
        hit_experts(g, weight, expert, gate_up, down, implementation="fast")
    with dispatch.compiling_for("gpu"), pytest.raises(ValueError, match="runs on a TPU"):
        hit_experts(g, weight, expert, gate_up, down, implementation="pallas_tpu")
    assert_close(hit_experts(g, weight, expert, gate_up, down),
                 reference.experts(g, weight, expert, gate_up, down), "kernel")
    with pytest.raises(ValueError, match="MoE has no implementation"):
        experts.apply("fast", True, g, weight, expert, gate_up, down)


def test_too_wide_for_the_chip_is_a_sentence(monkeypatch):
    g, gate_up, down = draw("float32", "plain")
    monkeypatch.setattr(tiles, "vmem_bytes", lambda: 60 << 10)
    assert not hit_pallas_tpu.fits(5, D, F, jnp.float32, jnp.float32)
    with pytest.raises(ValueError, match="A tile of 128 columns needs"):
        partial(hit_experts, implementation="pallas_tpu")(
            g, *route("even", len(g)), gate_up, down)
