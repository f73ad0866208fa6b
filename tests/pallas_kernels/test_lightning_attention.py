"""Lightning attention: every form against the float64 recurrence, and its gradients."""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, lightning_attention
from tests.reference import lightning as f64
from tests.tolerances import assert_close

B, N, H = 2, 4, 16
LENGTHS = (1, 63, 64, 65, 255, 256, 257, 1000, 2049)  # 2,048 tokens are one span of chunks
# Layers of the released 80: the fastest decay, the middle, the slowest lightning layer.
SLOPES = {layer: f64.slopes(64, layer, 80)[[0, 7, 31, 63]] for layer in (0, 40, 78)}

forms = {name: jax.jit(partial(lightning_attention, implementation=name))
         for name in ("xla", "reference", None)}


def draw(T, seed=0, dtype="float32", batch=B):
    rng = np.random.default_rng(seed + T)
    q, k, v = (jnp.asarray(rng.standard_normal((batch, T, N, H)), dtype) for _ in "qkv")
    state = jnp.asarray(rng.standard_normal((batch, N, H, H)), jnp.float32)
    return q, k, v, state


def expected(q, k, v, slopes, state=None, starts=None, lengths=None):
    """The float64 recurrence row by row; outputs at padding are zero."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, states = np.zeros_like(v), []
    for b in range(len(q)):
        n = q.shape[1] if lengths is None else lengths[b]
        out[b, :n], last = f64.recurrent(
            q[b, :n], k[b, :n], v[b, :n], slopes, None if state is None else np.asarray(state[b]),
            None if starts is None else starts[b, :n])
        states.append(last)
    return out, np.stack(states)


def check(got, wanted, dtype, what):
    assert got[0].dtype == jnp.dtype(dtype) and got[1].dtype == jnp.float32
    assert_close(got[0], wanted[0], "kernel", dtype, f"{what} output")
    assert_close(got[1], wanted[1], "state", dtype, f"{what} state")


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("layer", SLOPES)
def test_xla_equals_recurrence_with_initial_state(T, layer):
    q, k, v, state = draw(T)
    slopes = SLOPES[layer]
    check(forms["xla"](q, k, v, slopes, state), expected(q, k, v, slopes, state), "float32", "xla")


@pytest.mark.parametrize("form, T", [("xla", 64), ("xla", 257), ("reference", 64), (None, 1)],
                         ids=str)
def test_every_form_without_initial_state(T, form):
    q, k, v, _ = draw(T)
    check(forms[form](q, k, v, SLOPES[40]), expected(q, k, v, SLOPES[40]), "float32", form)


@pytest.mark.parametrize("form, T", [("xla", 65), ("xla", 257), ("reference", 65), (None, 1)],
                         ids=str)
@pytest.mark.parametrize("layer", (0, 78))
def test_bfloat16(T, form, layer):
    q, k, v, state = draw(T, dtype="bfloat16")
    got = forms[form](q, k, v, SLOPES[layer], state)
    check(got, expected(q, k, v, SLOPES[layer], state), "bfloat16", form)


@pytest.mark.parametrize("form", ("xla", "reference"))
def test_packed_starts_clear_the_state_between_samples(form):
    T = 200
    q, k, v, state = draw(T)
    starts = np.zeros((B, T), bool)
    # Two starts in a chunk, one on a chunk's first token, one on its last, one right after.
    starts[0, [3, 40, 64, 127, 128]] = True
    starts[1, [0, 199]] = True
    got = forms[form](q, k, v, SLOPES[78], state, starts_BT=jnp.asarray(starts))
    check(got, expected(q, k, v, SLOPES[78], state, starts), "float32", form)
    # Each sample alone, from an empty state, gives the same.
    alone = expected(q[:1, 40:64], k[:1, 40:64], v[:1, 40:64], SLOPES[78])[0]
    assert_close(got[0][:1, 40:64], alone, "kernel", "float32", "sample alone")


@pytest.mark.parametrize("form", ("xla", "reference"))
@pytest.mark.parametrize("lengths", ((257, 64), (65, 0), (1, 256), (200, 63)), ids=str)
def test_ragged_lengths_ignore_padding(form, lengths):
    T = 257
    q, k, v, state = draw(T)
    padding = (np.arange(T)[None, :] >= np.array(lengths)[:, None])[..., None, None]
    noisy = [jnp.where(padding, 1e4, x) for x in (q, k, v)]
    starts = np.zeros((B, T), bool)
    starts[0, 30] = True
    starts[1, 256] = True  # among padding: no start
    got = forms[form](*noisy, SLOPES[40], state, lengths_B=jnp.asarray(lengths),
                      starts_BT=jnp.asarray(starts))
    check(got, expected(q, k, v, SLOPES[40], state, starts, lengths), "float32", form)
    assert not np.asarray(got[0])[np.broadcast_to(padding, got[0].shape)].any()


@pytest.mark.parametrize("active", (True, False))
def test_decode_step_of_an_inactive_row_keeps_its_state(active):
    q, k, v, state = draw(1)
    out, new = forms[None](q, k, v, SLOPES[0], state, lengths_B=jnp.array([1, int(active)]))
    if active:
        check((out, new), expected(q, k, v, SLOPES[0], state), "float32", "decode")
    else:
        assert (np.asarray(new[1]) == np.asarray(state[1])).all()
        assert not np.asarray(out[1]).any()


@pytest.mark.parametrize("parts", ((1, 64, 65), (64, 1, 1, 64), (65, 65), (64, 65, 1)), ids=str)
def test_any_split_equals_the_whole(parts):
    q, k, v, state = draw(130)
    whole = expected(q, k, v, SLOPES[78], state)
    first, outs, carried = 0, [], state
    for length in parts:
        part = [x[:, first:first + length] for x in (q, k, v)]
        out, carried = forms[None if length == 1 else "xla"](*part, SLOPES[78], carried)
        outs.append(out)
        first += length
    check((jnp.concatenate(outs, axis=1), carried), whole, "float32", "split")


@partial(jax.jit, static_argnames="form")
def gradients(q, k, v, slopes, state, out_grad, state_grad, starts=None, lengths=None, *, form):
    """Gradients in q, k, v and the initial state of <out, out_grad> + <last state, state_grad>."""
    def scalar(q, k, v, state):
        out, last = lightning_attention(q, k, v, slopes, state, starts_BT=starts,
                                        lengths_B=lengths, implementation=form)
        return jnp.vdot(out, out_grad) + jnp.vdot(last, state_grad)

    return jax.grad(scalar, argnums=(0, 1, 2, 3))(q, k, v, state)


@pytest.mark.parametrize("layer", (0, 78))
@pytest.mark.parametrize("form, T", [("xla", 1), ("xla", 130), ("reference", 65)])
def test_gradients_equal_closed_form(form, T, layer):
    q, k, v, state = draw(T)
    out_grad, _, _, state_grad = draw(T, seed=1)
    got = gradients(q, k, v, SLOPES[layer], state, out_grad, state_grad, form=form)
    for b in range(B):
        wanted = f64.block_gradients(
            *(np.asarray(x[b]) for x in (q, k, v, out_grad)), SLOPES[layer], np.asarray(state[b]),
            size=64, state_grad=np.asarray(state_grad[b], np.float64))
        for name, have, want in zip(("dq", "dk", "dv", "dstate"), got, wanted, strict=True):
            assert_close(have[b], want, "gradient", "float32", name)


def test_spans_of_chunks_carry_the_state(monkeypatch):
    """Long inputs run span by span; short spans here give the same outputs and gradients."""
    xla = importlib.import_module("pallas_kernels.lightning_attention.xla")
    monkeypatch.setattr(xla, "SPAN", 128)
    T, lengths = 300, (300, 140)
    q, k, v, state = draw(T)
    starts = np.zeros((B, T), bool)
    starts[0, [128, 200]] = starts[1, 130] = starts[1, 290] = True
    out_grad, _, _, state_grad = draw(T, seed=1)
    arguments = (q, k, v, SLOPES[78], state, out_grad, state_grad, starts, np.array(lengths))
    run = partial(lightning_attention, starts_BT=starts, lengths_B=np.array(lengths),
                  implementation="xla")
    check(jax.jit(run)(q, k, v, SLOPES[78], state),
          expected(q, k, v, SLOPES[78], state, starts, lengths), "float32", "spans")
    pairs = zip(("dq", "dk", "dv", "dstate"), gradients(*arguments, form="xla"),
                gradients(*arguments, form="reference"), strict=True)
    for name, have, want in pairs:
        assert_close(have, want, "gradient", "float32", name)


def test_fast_decay_over_many_tokens_stays_finite():
    """λ^-256 of the fastest head overflows float32: no form may divide by a power of λ."""
    q, k, v, state = draw(1000)
    slopes = np.array([0.917, 5.0, 50.0, 1e-8])
    check(forms["xla"](q, k, v, slopes, state), expected(q, k, v, slopes, state), "float32", "xla")


def test_named_implementation_works_or_raises():
    q, k, v, state = draw(8)
    with pytest.raises(ValueError, match=r"no implementation 'cuda'.*reference, triton_gpu, xla"):
        lightning_attention(q, k, v, SLOPES[0], state, implementation="cuda")


@pytest.mark.parametrize("change, message", [
    (dict(k=(0, 7)), "share one shape"), (dict(v="float64"), "float32 or all bfloat16"),
    (dict(state="bfloat16"), "state_BNHH must be float32"), (dict(slopes=3), "slopes_N must have"),
], ids=("shape", "dtype", "state", "slopes"))
def test_arguments_that_do_not_fit_are_refused(change, message):
    q, k, v, state = draw(8)
    slopes = SLOPES[0]
    if "k" in change:
        k = k[:, slice(*change["k"])]
    if "v" in change:
        v = v.astype(jnp.bfloat16)
    if "state" in change:
        state = state.astype(jnp.bfloat16)
    if "slopes" in change:
        slopes = slopes[:3]
    with pytest.raises(ValueError, match=message):
        lightning_attention(q, k, v, slopes, state)


@pytest.mark.parametrize("dtype, H, target, message", [
    ("bfloat16", 128, "cpu", "this is a cpu"), ("float32", 128, "gpu", "got float32 and 128"),
    ("bfloat16", 32, "gpu", "got bfloat16 and 32")], ids=str)
def test_what_the_hopper_kernels_cannot_do_is_a_sentence(dtype, H, target, message):
    x = jnp.zeros((1, 8, 2, H), dtype)
    with dispatch.compiling_for(target), pytest.raises(ValueError, match=message):
        lightning_attention(x, x, x, np.ones(2), implementation="mosaic_gpu")
