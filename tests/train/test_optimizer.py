"""Schedules, decay mask, clipping, and settings out of range."""

import jax.numpy as jnp
import numpy as np
import pytest

from mmx import model
from mmx.errors import UserError
from mmx.train.config import OptimizerConfig, SourceConfig, TrainConfig
from mmx.train.optimizer import decays, learning_rate, make_optimizer
from tests import tolerances
from tests.train import tiny


def rates(steps, **kwargs):
    schedule = learning_rate(OptimizerConfig(peak_lr=1.0, **kwargs), steps)
    return np.asarray([float(schedule(step)) for step in range(steps + 1)])


def test_wsd_warms_up_holds_and_decays_to_the_floor():
    lr = rates(100, warmup_steps=10, decay_fraction=0.4, final_fraction=0.01)
    np.testing.assert_allclose(lr[:10], np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(lr[10:61], 1.0, rtol=1e-6)
    np.testing.assert_allclose(lr[60:], 0.01 ** (np.arange(41) / 40), rtol=1e-5)


def test_cosine_and_constant():
    lr = rates(50, schedule="cosine", warmup_steps=0, final_fraction=0.1)
    np.testing.assert_allclose(lr[[0, 25, 50]], [1.0, 0.55, 0.1], rtol=1e-5)
    assert (np.diff(lr) < 0).all()
    np.testing.assert_allclose(rates(50, schedule="constant", warmup_steps=5)[4:], 1.0)


def test_only_matrices_beside_the_embedding_decay():
    paths = model.param_specs(tiny.CONFIG)
    spared = sorted({path.split("/")[-2] for path in paths if not decays(path)})
    assert spared == ["attn_norm", "embed", "mlp_norm", "norm"]
    assert decays("head/weight") and decays("stack/0/1/moe/router")
    assert sum(map(decays, paths)) == len(paths) - 7


def test_update_is_adamw_with_clipping():
    optimizer = make_optimizer(OptimizerConfig(clip_norm=1.0))
    params = {"head/weight": jnp.asarray([2.0, -1.0]), "norm/weight": jnp.asarray([2.0])}
    grads = {"head/weight": jnp.asarray([3.0, 0.0]), "norm/weight": jnp.asarray([4.0])}
    state = optimizer.init(params)
    changes, state = optimizer.update(grads, state, params)
    # First Adam step: m / sqrt(v) is the sign of the (clipped) gradient.
    expected = {"head/weight": [-(1 + 0.2), 0.1], "norm/weight": [-1]}
    for path, value in expected.items():
        tolerances.assert_close(changes[path], value, "kernel", what=path)
    moments = state[1].mu.values()
    norm = np.sqrt(sum(float(jnp.sum((m / 0.1) ** 2)) for m in moments))
    tolerances.assert_close(norm, 1.0, "kernel", what="clipped gradient norm")


@pytest.mark.parametrize("setting", [
    dict(peak_lr=0.0), dict(peak_lr=float("nan")), dict(schedule="linear"), dict(b2=1.0),
    dict(decay_fraction=1.5), dict(final_fraction=0.0), dict(clip_norm=-1.0),
], ids=str)
def test_optimizer_settings_out_of_range_are_named(setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        OptimizerConfig(**setting)


@pytest.mark.parametrize("setting, words", [
    (dict(steps=0), "steps=0"), (dict(batch=6, accumulate=4), "accumulate=4"),
    (dict(dtype="float16"), "dtype='float16'"), (dict(export="always"), "export='always'"),
    (dict(sources=()), "nothing to train on"), (dict(seq_len=1), "seq_len=1"),
], ids=str)
def test_run_settings_out_of_range_are_named(setting, words):
    with pytest.raises(UserError, match=words):
        TrainConfig(**{"sources": (SourceConfig(),), **setting})
