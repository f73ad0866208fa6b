"""The TPU kernels of lightning attention, interpreted on a CPU, against float64 arithmetic."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, lightning_attention, lightning_decode_slots
from pallas_kernels.grouped_matmul.stacked import Stacked
from pallas_kernels.lightning_attention import pallas_tpu, pallas_tpu_backward
from pallas_kernels.lightning_attention.decode import lightning_decode_stacked
from pallas_kernels.lightning_attention.pallas_tpu_block import Blocks
from pallas_kernels.lightning_attention.segments import segments
from tests.reference import lightning as f64
from tests.tolerances import assert_close

B, N, H = 2, 2, 128
SMALL = Blocks(chunk=128, chunks=2, heads=2)  # several blocks in a few hundred tokens
SLOPES = {layer: f64.slopes(64, layer, 80)[[0, 63]].astype(np.float32) for layer in (0, 40, 78)}
STRICT = pltpu.InterpretParams(detect_races=True)


def draw(T, dtype="float32", seed=0, batch=B):
    rng = np.random.default_rng(seed + T)
    sequences = [jnp.asarray(rng.standard_normal((batch, T, N, H)), dtype) for _ in range(4)]
    states = [jnp.asarray(rng.standard_normal((batch, N, H, H)), jnp.float32) for _ in range(2)]
    return *sequences, *states


def some_starts(T):
    starts = np.zeros((B, T), bool)
    starts[0, [i for i in (0, 3, 127, 128, 200) if i < T]] = True
    starts[1, [T // 2, T - 1]] = True
    return starts


def expected(q, k, v, slopes, state=None, starts=None, lengths=None):
    out, states = np.zeros(q.shape), []
    for b in range(len(q)):
        n = q.shape[1] if lengths is None else lengths[b]
        rows = (np.asarray(x[b, :n], np.float64) for x in (q, k, v))
        out[b, :n], last = f64.recurrent(
            *rows, slopes, None if state is None else np.asarray(state[b], np.float64),
            None if starts is None else starts[b, :n])
        states.append(last)
    return out, np.stack(states)


def check(got, wanted, dtype):
    assert got[0].dtype == jnp.dtype(dtype) and got[1].dtype == jnp.float32
    assert_close(got[0], wanted[0], "kernel", dtype, "output")
    assert_close(got[1], wanted[1], "state", dtype, "state")


@partial(jax.jit, static_argnames="interpret")
def small_blocks(q, k, v, slopes, state, starts=None, lengths=None, interpret=True):
    return pallas_tpu.forward(q, k, v, slopes, state, starts, lengths, saves=True,
                              blocks=SMALL.fit(q.shape[1], N), interpret=interpret)


@partial(jax.jit, static_argnames="interpret")
def small_gradients(q, k, v, slopes, saved, starts, lengths, dout, dlast, interpret=True):
    return pallas_tpu_backward.backward(
        q, k, v, slopes, saved, starts, lengths, dout, dlast,
        blocks=SMALL.fit(q.shape[1], N), interpret=interpret)


@partial(jax.jit, static_argnames="form")
def gradients(q, k, v, slopes, state, dout, dlast, starts=None, lengths=None, *, form):
    def scalar(q, k, v, state):
        out, last = lightning_attention(q, k, v, slopes, state, starts_BT=starts,
                                        lengths_B=lengths, implementation=form)
        return jnp.vdot(out, dout.astype(out.dtype)) + jnp.vdot(last, dlast)

    return jax.grad(scalar, argnums=(0, 1, 2, 3))(q, k, v, state)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("T, layer", [
    (1, 40), (63, 0), (64, 78), (65, 40), (255, 0), (256, 40), (257, 78), (700, 40)], ids=str)
def test_forward_equals_recurrence(T, layer, dtype):
    q, k, v, _, state, _ = draw(T, dtype)
    got = small_blocks(q, k, v, SLOPES[layer], state)
    check(got, expected(q, k, v, SLOPES[layer], state), dtype)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_tuned_blocks_over_a_long_row_without_a_state(dtype):
    q, k, v, *_ = draw(4097, dtype, batch=1)
    run = jax.jit(partial(lightning_attention, implementation="pallas_tpu"))
    check(run(q, k, v, SLOPES[78]), expected(q, k, v, SLOPES[78]), dtype)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("T, lengths", [(300, None), (600, (600, 129)), (257, (257, 0))], ids=str)
def test_packed_and_ragged_rows(T, lengths, dtype):
    q, k, v, _, state, _ = draw(T, dtype)
    starts = some_starts(T)
    got = small_blocks(q, k, v, SLOPES[40], state, jnp.asarray(starts),
                       None if lengths is None else jnp.asarray(lengths))
    check(got, expected(q, k, v, SLOPES[40], state, starts, lengths), dtype)
    for b, n in enumerate(lengths or ()):
        assert not np.asarray(got[0][b, n:]).any()


def test_padding_may_hold_anything():
    q, k, v, _, state, _ = draw(300)
    lengths = np.array([300, 140])
    padding = (np.arange(300) >= lengths[:, None])[..., None, None]
    got = small_blocks(*(jnp.where(padding, jnp.nan, x) for x in (q, k, v)), SLOPES[40], state,
                       lengths=jnp.asarray(lengths))
    check(got, expected(q, k, v, SLOPES[40], state, lengths=lengths), "float32")


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("T, packed, lengths", [
    (65, False, None), (300, False, None), (300, True, None), (600, True, (600, 129))], ids=str)
def test_gradients_equal_those_of_the_reference(T, packed, lengths, dtype):
    q, k, v, dout, state, dlast = draw(T, dtype)
    starts = jnp.asarray(some_starts(T)) if packed else None
    lengths = None if lengths is None else jnp.asarray(lengths)
    *_, saved = small_blocks(q, k, v, SLOPES[40], state, starts, lengths)
    got = small_gradients(q, k, v, SLOPES[40], saved, starts, lengths, dout, dlast)
    exact = (x.astype(jnp.float32) for x in (q, k, v))
    wanted = gradients(*exact, SLOPES[40], state, dout, dlast, starts, lengths, form="reference")
    for name, have, want in zip(("dq", "dk", "dv", "dstate"), got, wanted, strict=True):
        assert have.dtype == (jnp.float32 if name == "dstate" else jnp.dtype(dtype))
        assert_close(have, want, "kernel", dtype, name)


def test_public_function_differentiates_through_the_kernels():
    q, k, v, dout, state, dlast = draw(130)
    arguments = q, k, v, SLOPES[0], state, dout, dlast
    for have, want in zip(gradients(*arguments, form="pallas_tpu"),
                          gradients(*arguments, form="reference"), strict=True):
        assert_close(have, want, "kernel", "float32")


def test_no_races_no_reads_beyond_bounds_and_everything_is_written():
    """The strict interpreter starts memory as NaN, and refuses what a TPU would let pass."""
    q, k, v, dout, state, dlast = draw(600)
    starts, lengths = jnp.asarray(some_starts(600)), jnp.array([600, 129])
    got = small_blocks(q, k, v, SLOPES[40], state, starts, lengths, interpret=STRICT)
    wanted = small_blocks(q, k, v, SLOPES[40], state, starts, lengths)
    grads = small_gradients(q, k, v, SLOPES[40], got[2], starts, lengths, dout, dlast,
                            interpret=STRICT)
    plain = small_gradients(q, k, v, SLOPES[40], got[2], starts, lengths, dout, dlast)
    for have, want in zip((*got, *grads), (*wanted, *plain), strict=True):
        assert np.array_equal(have, want)


def test_two_runs_are_bit_equal():
    arguments = *draw(257, "bfloat16")[:3], SLOPES[40], draw(257)[4]
    for one, two in zip(small_blocks(*arguments), small_blocks(*arguments), strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(two))


def test_decay_so_fast_that_its_inverse_overflows():
    q, k, v, _, state, _ = draw(300)
    slopes = np.array([50.0, 1e-8], np.float32)
    check(small_blocks(q, k, v, slopes, state), expected(q, k, v, slopes, state), "float32")


def test_boundaries_of_samples():
    starts = np.zeros((1, 12), bool)
    starts[0, [1, 3, 8, 11]] = True
    cut = segments(jnp.asarray(starts), jnp.array([10]), 4)  # the start at 11 is padding's
    assert cut.ends_BT.tolist() == [[1, 3, 3, 4, 4, 4, 4, 4, 4, 4, 4, 4]]
    assert cut.first_Bc.tolist() == [[1, 4, 0]] and cut.last_Bc.tolist() == [[3, 0, 0]]


@pytest.mark.parametrize("strict", (False, True), ids=("plain", "strict"))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_decode_in_slots(dtype, strict):
    rng = np.random.default_rng(0)
    heads, pool, slots = 16, 5, np.array([3, 0, 4], np.int32)
    q, k, v = (jnp.asarray(rng.standard_normal((3, heads, H)), dtype) for _ in range(3))
    states = jnp.asarray(rng.standard_normal((pool, heads, H, H)), jnp.float32)
    slopes = f64.slopes(64, 40, 80)[:heads].astype(np.float32)
    if strict:
        from pallas_kernels.lightning_attention import pallas_tpu_decode
        out, new = pallas_tpu_decode.decode(
            q, k, v, jnp.asarray(slopes), states, jnp.asarray(slots), interpret=STRICT)
    else:
        out, new = lightning_decode_slots(
            q, k, v, slopes, states, slots, implementation="pallas_tpu")
    wanted, last = expected(*(x[:, None] for x in (q, k, v)), slopes, states[slots])
    assert_close(out, wanted[:, 0], "kernel", dtype, "output")
    assert_close(new[slots], last, "state", dtype, "states")
    for free in set(range(pool)) - set(slots.tolist()):
        assert np.array_equal(new[free], states[free])
    by_xla = lightning_decode_slots(q, k, v, slopes, states, slots, implementation="xla")
    assert_close(by_xla[0], wanted[:, 0], "kernel", dtype, "output by XLA")
    assert_close(by_xla[1], new, "state", dtype, "states by XLA")


@pytest.mark.parametrize("strict", (False, True), ids=("plain", "strict"))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_decode_in_the_stack_of_all_layers(dtype, strict):
    """One layer's states of three, its second row inert."""
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.standard_normal((3, 1, 8, H)), dtype) for _ in range(3))
    old = rng.standard_normal((3, 3, 8, H, H)).astype(np.float32)
    slopes = f64.slopes(64, 40, 80)[:8].astype(np.float32)
    out, new = lightning_decode_stacked(
        q, k, v, slopes, Stacked(jnp.asarray(old), jnp.int32(1)), jnp.array([1, 0, 1]),
        implementation="pallas_tpu", interpret=STRICT if strict else True)
    active = np.array([0, 2])
    wanted, last = expected(*(x[active] for x in (q, k, v)), slopes, old[1, active])
    assert_close(out[active], wanted, "kernel", dtype, "output")
    assert_close(new.whole[1, active], last, "state", dtype, "states")
    assert not np.asarray(out[1], np.float32).any()
    untouched = np.array(new.whole)
    untouched[1, active] = old[1, active]
    assert np.array_equal(untouched, old)


def test_what_a_named_kernel_cannot_do_is_a_sentence():
    narrow = [jnp.zeros((1, 8, 2, 64))] * 3
    with pytest.raises(ValueError, match=r"multiple of 128; these have 64\. Pass 'xla'"):
        lightning_attention(*narrow, np.ones(2), implementation="pallas_tpu")
    wide = [jnp.zeros((1, 8, 2, 128))] * 3
    with dispatch.compiling_for("gpu"), pytest.raises(ValueError, match="this is a GPU"):
        lightning_attention(*wide, np.ones(2), implementation="pallas_tpu")
    with pytest.raises(ValueError, match="states_PNHH must be float32"):
        lightning_decode_slots(*[jnp.zeros((1, 2, 128))] * 3, np.ones(2),
                               jnp.zeros((1, 2, 64, 128)), np.zeros(1, np.int32))
    pool = jnp.zeros((1, 2, 128, 128))
    with pytest.raises(ValueError, match="this is a cpu"):
        lightning_decode_slots(*[jnp.zeros((1, 2, 128))] * 3, np.ones(2), pool,
                               np.zeros(1, np.int32), implementation="mosaic_gpu")
    with dispatch.compiling_for("gpu"), pytest.raises(ValueError, match="bfloat16; got float32"):
        lightning_decode_slots(*[jnp.zeros((1, 2, 128))] * 3, np.ones(2), pool,
                               np.zeros(1, np.int32), implementation="mosaic_gpu")
