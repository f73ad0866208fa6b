"""Loss and gradients: chunked as whole, accumulated as at once, packed as apart."""

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx import model
from mmx.train import losses
from mmx.train import step as steps
from mmx.train.config import OptimizerConfig
from mmx.train.optimizer import make_optimizer
from tests import tolerances
from tests.train import tiny

HOW = steps.StepConfig(dtype="float32", aux_coef=0.0, z_coef=1e-3, num_sources=2)


@functools.cache
def compiled(how, chunk):
    return jax.jit(partial(steps.gradients, tiny.CONFIG, how))


def gradients(how, params, batch):
    return compiled(how, losses._LOGITS_AT_ONCE)(params, batch)


def assert_same(ones, others, kind="gradient"):
    for path in ones:
        tolerances.assert_close(ones[path], others[path], kind, what=path)


def test_loss_equals_the_plain_formula():
    params, batch = tiny.params(), tiny.batch(6, 24, sources=2)
    logits, _ = model.forward(tiny.CONFIG, params, batch.tokens_BS[:, :-1],
                              starts_BT=batch.starts_BT)
    logits = np.asarray(logits, np.float64)
    peak = logits.max(-1)
    lse = peak + np.log(np.exp(logits - peak[..., None]).sum(-1))
    target = np.take_along_axis(logits, batch.tokens_BS[:, 1:, None], -1)[..., 0]
    nll = lse - target
    _, metrics = gradients(HOW, params, batch)
    weight = batch.weights_BT
    expected = {"loss": (nll * weight).sum() / weight.sum(),
                "nll": [(nll * (weight > 0))[i::2].sum() for i in range(2)],
                "targets": [(weight > 0)[i::2].sum() for i in range(2)],
                "right": [((weight > 0) * (logits.argmax(-1) == batch.tokens_BS[:, 1:]))[i::2].sum()
                          for i in range(2)]}
    for name, value in expected.items():
        tolerances.assert_close(metrics[name], value, "kernel", what=name)
    assert float(metrics["balance"]) == pytest.approx(2.0, abs=0.5)


def test_chunked_loss_equals_the_loss_at_once(monkeypatch):
    params, batch = tiny.params(), tiny.batch(6, 24)
    at_once = gradients(HOW, params, batch)
    assert losses.chunk_tokens(6 * 24, 260) == 6 * 24
    monkeypatch.setattr(losses, "_LOGITS_AT_ONCE", 4 * 260 * 6 * 7)
    chunked = gradients(HOW, params, batch)
    tolerances.assert_close(chunked[1]["loss"], at_once[1]["loss"], "kernel")
    assert_same(chunked[0], at_once[0])


def test_accumulation_equals_the_big_batch():
    params, batch = tiny.params(), tiny.batch(6, 24, sources=2)
    whole = gradients(HOW, params, batch)
    parts = gradients(dataclasses.replace(HOW, accumulate=3), params, batch)
    assert_same(parts[0], whole[0])
    for name in ("loss", "nll", "targets", "right"):
        tolerances.assert_close(parts[1][name], whole[1][name], "kernel", what=name)


def test_capacity_drops_pairs_and_says_how_many():
    """Room for all changes nothing; less room loses pairs, and the metrics say their share."""
    params, batch = tiny.params(), tiny.batch(6, 24)
    whole, metrics = gradients(HOW, params, batch)
    roomy = tiny.CONFIG.num_experts / tiny.CONFIG.experts_per_token
    same, none = gradients(dataclasses.replace(HOW, moe_capacity=roomy), params, batch)
    assert_same(same, whole)
    assert "dropped" not in metrics and float(none["dropped"]) == 0
    tight = dataclasses.replace(HOW, moe_capacity=0.5)
    cut, some = gradients(tight, params, batch)
    # Half of the pairs find no room at least, and more where an expert is not filled.
    assert 0.5 <= float(some["dropped"]) < 0.7
    assert all(np.isfinite(leaf).all() for leaf in cut.values())
    assert float(some["loss"]) != float(metrics["loss"])
    # Evaluation drops nothing.
    evaluated = steps.make_eval_step(tiny.CONFIG, tight)(params, batch)
    tolerances.assert_close(evaluated["nll"], np.sum(metrics["nll"]), "kernel")


def test_packed_samples_get_the_gradients_of_separate_ones():
    rng = np.random.default_rng(5)
    lengths = [25, 70, 37, 9]  # inside, across and at the edges of the chunks of 64
    samples = [rng.integers(0, 260, n) for n in lengths]
    starts = np.zeros((1, sum(lengths)), bool)
    starts[0, np.cumsum([0, *lengths[:-1]])] = True
    tokens = np.concatenate([*samples, [0]])[None].astype(np.int32)
    weights = np.ones((1, sum(lengths)), np.float32)
    weights[0, np.cumsum(lengths) - 1] = 0
    packed = tiny.batch(1, sum(lengths))._replace(
        tokens_BS=tokens, starts_BT=starts, weights_BT=weights)
    apart = tiny.batch(len(samples), max(lengths))
    apart.tokens_BS[:], apart.weights_BT[:] = 0, 0
    for row, sample in enumerate(samples):
        apart.tokens_BS[row, :len(sample)] = sample
        apart.weights_BT[row, :len(sample) - 1] = 1
    apart = apart._replace(starts_BT=np.zeros_like(apart.starts_BT))
    params = tiny.params()
    one, other = gradients(HOW, params, packed), gradients(HOW, params, apart)
    tolerances.assert_close(one[1]["loss"], other[1]["loss"], "kernel")
    assert_same(one[0], other[0])
    leaky = packed._replace(starts_BT=np.zeros_like(starts))
    with pytest.raises(AssertionError):
        assert_same(gradients(HOW, params, leaky)[0], other[0])


def test_balance_loss_evens_out_the_router():
    params, batch = tiny.params(), tiny.batch(6, 24)
    how = dataclasses.replace(HOW, aux_coef=1.0)
    grads, metrics = gradients(how, params, batch)
    routers = {path: leaf for path, leaf in grads.items() if path.endswith("router")}
    moved = {path: leaf - 0.3 * routers.get(path, 0) for path, leaf in params.items()}
    assert float(gradients(how, moved, batch)[1]["balance"]) < float(metrics["balance"])


def test_bfloat16_compute_keeps_float32_masters_and_learns():
    rule = OptimizerConfig()
    update = steps.make_train_step(tiny.CONFIG, rule, steps.StepConfig())
    state, batch = steps.init_state(tiny.params(), make_optimizer(rule)), tiny.batch(6, 24)
    seen = []
    for _ in range(40):
        state, metrics = update(state, batch, np.float32(1e-2))
        seen.append(float(metrics["loss"]))
    assert seen[-1] < 0.6 * seen[0] and np.isfinite(seen).all()
    assert {leaf.dtype for leaf in state.params.values()} == {jnp.dtype("float32")}
    assert int(state.step) == 40
