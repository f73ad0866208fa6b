"""Precision points stay float32 in a bfloat16 model: state, router, angles, softmax, head.

Two kinds of test: one walks every intermediate of the traced model and names the cast that slipped
in, the other gives inputs on which a bfloat16 step would change the result.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from mmx.cache import init_cache
from mmx.config import LIGHTNING
from mmx.model import forward, param_specs, step
from mmx.nn.linear import Head
from mmx.nn.moe import MoE
from mmx.nn.params import Factory
from mmx.nn.rope import apply_rope
from mmx.parallel.ops import Ops
from pallas_kernels import attention, lightning_attention
from tests import tiny
from tests.reference import lightning as f64
from tests.reference.model import rope
from tests.tolerances import assert_close

# Sizes that no two axes share, so that a shape tells what a value is.
CONFIG = tiny.config(2, 2, hidden_size=42, head_dim=22, rotary_dim=10, num_heads=6, num_kv_heads=3,
                     num_experts=7, expert_dim=34, vocab_size=101)
B, T = 2, 19
_turn = jax.jit(apply_rope, static_argnums=(2, 3))


def _equations(jaxpr):
    """All equations, those of inner programs too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if isinstance(inner, core.ClosedJaxpr):
                    yield from _equations(inner.jaxpr)
                elif isinstance(inner, core.Jaxpr):
                    yield from _equations(inner)


def _trace(how):
    params = {path: jax.ShapeDtypeStruct(spec.shape, "bfloat16")
              for path, spec in param_specs(CONFIG, "bfloat16").items()}
    ids = jax.ShapeDtypeStruct((B, T if how != "decode" else 1), jnp.int32)
    if how == "forward":
        traced = jax.make_jaxpr(lambda p, ids: forward(CONFIG, p, ids)[0])(params, ids)
    else:
        cache = jax.eval_shape(lambda: init_cache(CONFIG, B, 64, "bfloat16"))
        lengths = jax.ShapeDtypeStruct((B,), jnp.int32)
        traced = jax.make_jaxpr(lambda *a: step(CONFIG, *a, logits="all"))(
            params, cache, ids, lengths)
    return list(_equations(traced.jaxpr))


@pytest.mark.parametrize("how", ("forward", "prefill", "decode"))
def test_no_cast_slips_in(how):
    length, H, E, V = (1 if how == "decode" else T), 22, 7, 101
    seen = set()
    for equation in _trace(how):
        for out in equation.outvars:
            if not hasattr(out.aval, "dtype"):
                continue
            shape, low = tuple(out.aval.shape), out.aval.dtype == jnp.bfloat16
            role = None
            if shape[-2:] == (H, H):
                role = "lightning state"
            elif shape[-1:] == (E,) and shape[-2:-1] in ((B * length,), (length,)):
                role = "router"
            elif shape[-1:] == (V,) and shape[-2:-1] == (length,):
                role = "logits"
            elif equation.primitive.name in ("cos", "sin"):
                role = "rotary angle"
            elif equation.primitive.name == "exp":
                role = "softmax or decay"
            elif equation.primitive.name == "rsqrt":
                role = "norm statistics"
            if role:
                seen.add(role)
                assert not low, f"{role} {shape} is bfloat16 in {equation.primitive.name}"
    assert seen >= {"lightning state", "router", "logits", "rotary angle", "softmax or decay",
                    "norm statistics"}


def test_walk_sees_a_cast():
    """The walk itself: a bfloat16 exponential inside scan and jit is found."""
    def body(c, x):
        return c, jax.jit(jnp.exp)(x)

    traced = jax.make_jaxpr(lambda x: jax.lax.scan(body, 0, x))(jnp.zeros(3, jnp.bfloat16))
    assert any(e.primitive.name == "exp" and e.outvars[0].aval.dtype == jnp.bfloat16
               for e in _equations(traced.jaxpr))


def test_cache_of_a_bfloat16_model():
    params = tiny.params(CONFIG, tiny.tensors(CONFIG), "bfloat16")
    cache = init_cache(CONFIG, B, 64, "bfloat16")
    logits, cache = jax.jit(step, static_argnums=0)(
        CONFIG, params, cache, np.ones((B, T), np.int32), np.array([T, 3]))
    assert logits.dtype == jnp.float32
    lightning, softmax = cache.stacks[0]
    assert lightning["state"].dtype == jnp.float32
    assert softmax["k"].dtype == softmax["v"].dtype == jnp.bfloat16


def test_state_carries_what_bfloat16_would_lose():
    """2,000 equal updates: a bfloat16 sum stalls at 256."""
    one = jnp.ones((1, 1, 1, 4), jnp.bfloat16)
    slopes = jnp.array([1e-9])
    decode = jax.jit(lambda state: jax.lax.fori_loop(
        0, 2000, lambda _, s: lightning_attention(one, one, one, slopes, s)[1], state))
    assert_close(decode(jnp.zeros((1, 1, 4, 4))), np.full((1, 1, 4, 4), 2000.0), "state")


def test_carried_state_only_decays_over_chunks_without_keys():
    """k = 0 over 1,000 bfloat16 tokens leaves λ^1000 S exactly as float32 would."""
    state = jax.random.normal(jax.random.key(0), (1, 2, 8, 8))
    slopes = f64.slopes(64, 78, 80)[[31, 63]]
    q, zero = jnp.ones((1, 1000, 2, 8), jnp.bfloat16), jnp.zeros((1, 1000, 2, 8), jnp.bfloat16)
    _, last = jax.jit(lightning_attention)(q, zero, q, slopes, state)
    assert_close(last[0], np.exp(-1000 * slopes)[:, None, None] * np.asarray(state[0], np.float64),
                 "state")


def test_router_separates_what_bfloat16_would_tie():
    """Logits 512 and 512.0078: one number in bfloat16, whose tie goes to the first expert."""
    config = tiny.config(1, layer_types=(LIGHTNING,), hidden_size=512, num_experts=2,
                         experts_per_token=1)
    values = {"router": jnp.ones((512, 2), jnp.bfloat16).at[0, 1].set(1.0078125),
              "gate_up": jnp.zeros((2, 2, 512, 32), jnp.bfloat16),
              "down": jnp.zeros((2, 32, 512), jnp.bfloat16)}
    moe = MoE(config, Factory(lambda spec: values[spec.path], "bfloat16"), 1.0)
    _, stats = moe(jnp.ones((1, 3, 512), jnp.bfloat16), None, Ops())
    assert stats.chosen_E.tolist() == [0, 3]


def test_head_sums_in_float32():
    """300 terms of 1 and one of 2^-8: a bfloat16 sum or result loses the small one."""
    config = tiny.config(1, layer_types=(LIGHTNING,), hidden_size=301, vocab_size=3)
    weight = jnp.ones((3, 301), jnp.bfloat16).at[1, 0].set(2**-8).at[2].set(0)
    head = Head(config, Factory(lambda spec: weight, "bfloat16"))
    logits = head(jnp.ones((1, 301), jnp.bfloat16))
    assert logits.dtype == jnp.float32
    assert logits.tolist() == [[301.0, 300.00390625, 0.0]]


@pytest.mark.parametrize("position", (1, 4095, 1_000_003, 10_239_999))
def test_rotary_angles_are_float32_products(position):
    """Far positions: a bfloat16 angle would be off by whole turns, an exact one by a few 1e-2."""
    x = np.random.default_rng(0).standard_normal((1, 2, 128))
    wanted = rope(x, np.array([position]), 64, 1e7)
    got = _turn(x[None].astype(np.float32), np.array([[position]]), 64, 1e7)
    assert_close(got[0], wanted, "constant", "float32")
    x = x.astype(jnp.bfloat16)
    got = _turn(x[None], np.array([[position]]), 64, 1e7)
    assert got.dtype == jnp.bfloat16
    wanted = rope(np.asarray(x, np.float64), np.array([position]), 64, 1e7)
    assert_close(got[0], wanted, "kernel", "bfloat16")


def test_softmax_scores_are_float32():
    """Scores 256 and 257: equal in bfloat16, weights 1 : e in float32."""
    q = np.full((1, 1, 1, 4), 2.0).astype(jnp.bfloat16)
    k = np.array([[256, 0, 0, 0], [256, 1, 0, 0]])[None, :, None].astype(jnp.bfloat16)
    v = np.array([[0] * 4, [1] * 4])[None, :, None].astype(jnp.bfloat16)
    for name in (None, "reference"):
        run = jax.jit(partial(attention, implementation=name))
        out = run(q, k, v, offsets_B=np.array([1]))
        assert_close(out[0, 0, 0], np.full(4, 1 / (1 + np.exp(-1.0))), "kernel", "bfloat16", name)
