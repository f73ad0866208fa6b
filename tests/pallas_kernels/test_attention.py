"""Softmax attention: both forms against a float64 definition, with caches and packed rows."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention
from tests.tolerances import assert_close

B, H = 2, 16
HEADS = {"mha": (4, 4), "gqa": (6, 2), "mqa": (4, 1)}
forms = {name: jax.jit(partial(attention, implementation=name)) for name in ("xla", "reference")}


def draw(T, S, heads, dtype="float32", seed=0):
    N, K = HEADS[heads]
    rng = np.random.default_rng(seed + 7 * T + S)
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, H))
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def expected(q, k, v, offsets=None, samples=None):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    T, S, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    offsets = np.zeros(len(q), int) if offsets is None else np.asarray(offsets)
    seen = np.arange(S) <= (offsets[:, None] + np.arange(T))[..., None]
    if samples is not None:
        seen &= samples[:, :, None] == samples[:, None, :]
    out = np.empty_like(q)
    for b in range(len(q)):
        for n in range(q.shape[2]):
            scores = np.where(seen[b], q[b, :, n] @ k[b, :, n // group].T / np.sqrt(H), -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[b, :, n] = weights @ v[b, :, n // group] / weights.sum(-1, keepdims=True)
    return out


@pytest.mark.parametrize("form, heads, T", [
    ("xla", "gqa", 1), ("xla", "gqa", 257), ("xla", "gqa", 600), ("xla", "mha", 257),
    ("xla", "mqa", 257), ("reference", "gqa", 257), ("reference", "mqa", 1)])
def test_causal(form, heads, T):
    q, k, v = draw(T, T, heads)
    assert_close(forms[form](q, k, v), expected(q, k, v), "kernel", "float32", form)


@pytest.mark.parametrize("form, T, S, offsets", [
    ("xla", 1, 64, (0, 63)), ("xla", 1, 2500, (1023, 1024)), ("xla", 1, 2500, (2499, 0)),
    ("xla", 40, 2500, (2100, 3)), ("xla", 40, 2500, (0, 2460)), ("xla", 5, 1024, (1019, 500)),
    ("reference", 40, 2500, (2100, 3))], ids=str)
def test_queries_at_offsets_of_a_cache(form, T, S, offsets):
    """Rows stand at different places; what lies beyond a row's last query must not matter."""
    q, k, v = draw(T, S, "gqa")
    wanted = expected(q, k, v, offsets)
    beyond = (np.arange(S)[None] >= np.array(offsets)[:, None] + T)[..., None, None]
    k, v = (jnp.where(beyond, 1e4, x) for x in (k, v))
    got = forms[form](q, k, v, offsets_B=jnp.array(offsets))
    assert_close(got, wanted, "kernel", "float32", form)


@pytest.mark.parametrize("form", forms)
def test_packed_rows_attend_within_their_sample(form):
    T = 600
    q, k, v = draw(T, T, "gqa")
    samples = np.zeros((B, T), np.int32)
    samples[0, 3:] += 1
    samples[0, 512:] += 1
    samples[1, 511:] += 1
    got = forms[form](q, k, v, samples_BT=jnp.asarray(samples))
    assert_close(got, expected(q, k, v, samples=samples), "kernel", "float32", form)
    alone = expected(q[:1, 3:512], k[:1, 3:512], v[:1, 3:512])
    assert_close(got[:1, 3:512], alone, "kernel", "float32", "sample alone")


@pytest.mark.parametrize("form", forms)
def test_bfloat16(form):
    q, k, v = draw(257, 257, "gqa", "bfloat16")
    got = forms[form](q, k, v)
    assert got.dtype == jnp.bfloat16
    assert_close(got, expected(q, k, v), "kernel", "bfloat16", form)
    q = q[:, :1]
    got = forms[form](q, k, v, offsets_B=jnp.array([256, 100]))
    assert_close(got, expected(q, k, v, (256, 100)), "kernel", "bfloat16", "decode")


def test_gradients_equal_the_reference():
    T = 600
    q, k, v = draw(T, T, "gqa")
    weight = draw(T, T, "gqa", seed=1)[0]
    samples = jnp.asarray(np.arange(T)[None] >= np.array([[100], [513]]), jnp.int32)

    def gradients(form):
        def scalar(*qkv):
            return jnp.vdot(attention(*qkv, samples_BT=samples, implementation=form), weight)

        return jax.jit(jax.grad(scalar, argnums=(0, 1, 2)))(q, k, v)

    pairs = zip("qkv", gradients("xla"), gradients("reference"), strict=True)
    for name, have, want in pairs:
        assert_close(have, want, "gradient", "float32", f"d{name}")


def test_large_scores_do_not_overflow():
    q, k, v = draw(64, 64, "mha")
    got = forms["xla"](q * 100, k * 100, v)
    assert_close(got, expected(q * 100, k * 100, v), "kernel", "float32", "large scores")


def test_named_implementation_works_or_raises():
    q, k, v = draw(8, 8, "mha")
    with pytest.raises(ValueError, match=r"no implementation 'flash'.*reference, splash, xla"):
        attention(q, k, v, implementation="flash")


def test_arguments_that_do_not_fit_are_refused():
    q, k, v = draw(8, 8, "gqa")
    with pytest.raises(ValueError, match="K dividing N"):
        attention(q[:, :, :5], k, v)
    with pytest.raises(ValueError, match="without a cache"):
        attention(q, k, v, offsets_B=jnp.zeros(B, int), samples_BT=jnp.zeros((B, 8), int))
    with pytest.raises(ValueError, match="at least as many keys"):
        attention(q, k[:, :4], v[:, :4])
