"""The state of a piece alone: every form against the float64 recurrence, and its gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, lightning_state
from pallas_kernels.lightning_attention import pallas_tpu_state, state
from tests.reference import lightning as f64
from tests.tolerances import assert_close

B, N = 2, 4
WIDTH = {"xla": 16, "reference": 16, "pallas_tpu": 128}
SLOPES = {layer: f64.slopes(64, layer, 80)[[0, 7, 31, 63]] for layer in (0, 40, 78)}
LENGTHS = (1, 63, 64, 65, 255, 256, 257, 4097)


@pytest.fixture(autouse=True)
def short_spans_and_blocks(monkeypatch):
    """Several of them in a few hundred tokens, the last one overlapping or beyond the row."""
    monkeypatch.setattr(state, "SPAN", 100)
    monkeypatch.setattr(pallas_tpu_state, "BLOCK", 128)


def draw(T, H, dtype="float32"):
    rng = np.random.default_rng(T)
    k, v = (jnp.asarray(rng.standard_normal((B, T, N, H)), dtype) for _ in "kv")
    return k, v, jnp.asarray(rng.standard_normal((B, N, H, H)), jnp.float32)


def expected(k, v, slopes, first, starts=None, lengths=None, reverse=False):
    """The float64 recurrence row by row; in reverse that of the gradient in the state."""
    k, v, first = (np.asarray(x, np.float64) for x in (k, v, first))
    decay = np.exp(-np.asarray(slopes, np.float64))[:, None, None]
    rows = []
    for b in range(B):
        n = k.shape[1] if lengths is None else lengths[b]
        begins = np.zeros(n, bool) if starts is None else starts[b, :n]
        if not reverse:
            rows.append(f64.recurrent(k[b, :n], k[b, :n], v[b, :n], slopes, first[b], begins)[1])
            continue
        gradient = first[b].copy()
        for t in reversed(range(n)):
            gradient += k[b, t, :, :, None] * v[b, t, :, None, :]
            gradient = np.zeros_like(gradient) if begins[t] else decay * gradient
        rows.append(gradient)
    return np.stack(rows)


@partial(jax.jit, static_argnames=("form", "reverse"))
def run(k, v, slopes, first, starts=None, lengths=None, *, form, reverse=False):
    return lightning_state(k, v, slopes, first, starts_BT=starts, lengths_B=lengths,
                           reverse=reverse, implementation=form)


@pytest.mark.parametrize("form, T, layer", [
    *(("xla", T, layer) for T in LENGTHS for layer in SLOPES), ("reference", 65, 40),
    *(("pallas_tpu", T, layer) for T, layer in (
        (1, 40), (63, 0), (64, 78), (257, 0), (4097, 40), (4097, 78)))], ids=str)
def test_equals_recurrence(form, T, layer):
    k, v, first = draw(T, WIDTH[form])
    for reverse in (False, True):
        got = run(k, v, SLOPES[layer], first, form=form, reverse=reverse)
        assert got.dtype == jnp.float32
        assert_close(got, expected(k, v, SLOPES[layer], first, reverse=reverse), "state")


@pytest.mark.parametrize("reverse", (False, True), ids=("forward", "reverse"))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("form", WIDTH)
def test_packed_and_ragged_rows(form, dtype, reverse):
    T = 300
    clean_k, clean_v, first = draw(T, WIDTH[form], dtype)
    starts = np.zeros((B, T), bool)
    starts[0, [0, 3, 127, 128, 200]] = True
    starts[1, 280] = True  # in most cases among padding: no start
    for lengths in ((300, 300), (300, 129), (257, 0), (1, 64)):
        padding = (np.arange(T)[None, :] >= np.array(lengths)[:, None])[..., None, None]
        k, v = (jnp.where(padding, 1e4, x).astype(dtype) for x in (clean_k, clean_v))
        for marks in (starts, starts & False):
            got = run(k, v, SLOPES[40], first, marks, np.array(lengths), form=form,
                      reverse=reverse)
            wanted = expected(k, v, SLOPES[40], first, marks, lengths, reverse)
            assert_close(got, wanted, "state", dtype, f"{lengths}, starts {marks.any()}")


def test_no_races_and_no_reads_beyond_bounds():
    """The strict interpreter starts memory as NaN, and refuses what a TPU would let pass."""
    k, v, _ = draw(300, 128)
    bounds = jnp.array([3, 0]), jnp.array([300, 0])
    slopes = jnp.asarray(SLOPES[78], jnp.float32)
    for reverse in (False, True):
        bare = jnp.zeros_like(bounds[0]) if reverse else bounds[0], bounds[1]
        strict, plain = (pallas_tpu_state.state(k, v, slopes, *bare, reverse, interpret=how)
                         for how in (pltpu.InterpretParams(detect_races=True), True))
        assert np.array_equal(strict, plain) and not np.asarray(strict[1]).any()


@pytest.mark.parametrize("reverse", (False, True), ids=("forward", "reverse"))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("form, T", [("xla", 257), ("pallas_tpu", 65), ("xla", 1)], ids=str)
def test_gradients_equal_those_of_the_reference(form, T, dtype, reverse):
    k, v, first = draw(T, WIDTH[form], dtype)
    starts = np.zeros((B, T), bool)
    starts[0, T // 3] = True
    weight = draw(T + 1, WIDTH[form])[2]

    def gradients(form, *arrays):
        return jax.grad(lambda *x: jnp.vdot(run(
            x[0], x[1], SLOPES[40], x[2], starts, np.array([T, T // 2]), form=form,
            reverse=reverse), weight), argnums=(0, 1, 2))(*arrays)

    got = gradients(form, k, v, first)
    exact = jax.jit(jax.grad(lambda k, v, first: jnp.vdot(_plain(
        k, v, first, starts, np.array([T, T // 2]), reverse), weight), argnums=(0, 1, 2)))
    wanted = exact(k.astype(jnp.float32), v.astype(jnp.float32), first)
    for name, have, want in zip(("dk", "dv", "dstate"), got, wanted, strict=True):
        assert have.dtype == (jnp.float32 if name == "dstate" else jnp.dtype(dtype))
        assert_close(have, want, "gradient", dtype, name)


def _plain(k, v, first, starts, lengths, reverse):
    """The recurrence in jax, differentiated by it."""
    decay = jnp.exp(-jnp.asarray(SLOPES[40], jnp.float32))[:, None, None]

    def token(carried, inputs):
        k, v, begins, inside = inputs
        begins, inside = begins[:, None, None, None], inside[:, None, None, None]
        new = k[..., :, None] * v[..., None, :]
        if reverse:
            moved = jnp.where(begins, 0.0, decay * (carried + new))
        else:
            moved = jnp.where(begins, 0.0, decay * carried) + new
        return jnp.where(inside, moved, carried), None

    inside = np.arange(k.shape[1]) < lengths[:, None]
    by_time = [jnp.moveaxis(x, 1, 0) for x in (k, v, jnp.asarray(starts), jnp.asarray(inside))]
    return jax.lax.scan(token, first, by_time, reverse=reverse)[0]


def test_only_tokens_that_last_are_read():
    """What has decayed below e^-28 may be anything; no token that has not is missed."""
    T = 4097
    k, v, first = draw(T, 128)
    first = jnp.zeros_like(first)
    slopes = np.float32([0.5, 0.25, 0.1, 0.02])
    begin, end = state.windows(jnp.asarray(slopes), jnp.zeros(B, jnp.int32),
                               jnp.array([T, 5]), T, False)
    assert begin.tolist() == [[T - 57, T - 113, T - 281, T - 1401], [0] * N]
    assert end.tolist() == [[T] * N, [5] * N]
    begin, end = state.windows(jnp.asarray(slopes), jnp.zeros(B, jnp.int32),
                               jnp.array([T, 0]), T, True)
    assert begin.tolist() == [[0] * N] * 2 and end.tolist() == [[57, 113, 281, 1401], [0] * N]
    far = (jnp.arange(T) < T - 1401 - 128)[:, None, None]
    for form in ("xla", "pallas_tpu"):
        noisy = [jnp.where(far, jnp.nan, x) for x in (k, v)]
        got = run(*noisy, slopes, first, form=form)
        assert_close(got, expected(k, v, slopes, first), "state", "float32", form)


def test_what_a_named_form_cannot_do_is_a_sentence():
    k, v, _ = draw(8, 16)
    for target, form, message in (
            ("cpu", "pallas_tpu", "multiple of 128; this is a cpu with heads of 16"),
            ("cpu", "mosaic_gpu", "this is a cpu"), ("gpu", "mosaic_gpu", "got float32 and 16"),
            ("cpu", "cuda", "no implementation 'cuda'")):
        with dispatch.compiling_for(target), pytest.raises(ValueError, match=message):
            lightning_state(k, v, SLOPES[0], implementation=form)
    with pytest.raises(ValueError, match="slopes_N must have shape"):
        lightning_state(k, v, SLOPES[0][:3])
