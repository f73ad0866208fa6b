"""Capacity of experts: who finds room, against a loop over pairs; what a global router saves."""

import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from mmx.nn.moe import MoE, route
from mmx.nn.params import Factory
from mmx.parallel.capacity import size, within
from mmx.parallel.ops import Ops
from tests import tolerances
from tests.train import tiny


def first_come(expert, valid, num_experts, factor):
    """Pairs one by one, in the order of rows, tokens and choices."""
    most = size(factor, int(valid.sum()) * expert.shape[-1], num_experts)
    taken, kept = [0] * num_experts, np.zeros(expert.shape, bool)
    for place in np.ndindex(*expert.shape):
        e = expert[place]
        if valid[place[:2]] and taken[e] < most:
            taken[e] += 1
            kept[place] = True
    return kept


@pytest.mark.parametrize("factor", [0.25, 1.0, 1.5, 4.0])
@pytest.mark.parametrize("lengths", [(9, 9, 9), (9, 0, 4)])
def test_room_goes_to_the_first(factor, lengths):
    random = np.random.default_rng(int(8 * factor))
    expert = np.where(random.uniform(size=(3, 9, 2)) < 0.6, 1, random.integers(0, 4, (3, 9, 2)))
    valid = np.arange(9) < np.array(lengths)[:, None]
    given = None if valid.all() else jnp.asarray(valid)
    kept = np.asarray(within(jnp.asarray(expert), given, 4, factor))
    np.testing.assert_array_equal(kept, first_come(expert, valid, 4, factor))
    assert kept.any() and (factor >= 4 or not kept[valid].all())


def test_dropped_pairs_add_nothing_and_weights_stay():
    """The layer against its formula, choice by choice."""
    config = tiny.CONFIG
    E, D, F = config.num_experts, config.hidden_size, config.expert_dim
    random = np.random.default_rng(5)
    params = {name: random.standard_normal(shape).astype(np.float32) for name, shape in (
        ("router", (D, E)), ("gate_up", (2, E, D, F)), ("down", (E, F, D)))}
    layer = MoE(config, Factory(lambda spec: params[spec.path], "float32"), 1.0)
    g = random.standard_normal((2, 6, D)).astype(np.float32)
    out, stats = layer(jnp.asarray(g), None, Ops(), capacity=0.75)
    weight, expert, _ = (np.asarray(x, np.float64) for x in route(g @ params["router"], layer.k))
    expert = expert.astype(int)
    kept = first_come(expert, np.ones((2, 6), bool), E, 0.75)
    wanted = np.zeros(g.shape)
    for b, t, c in np.argwhere(kept):
        gate, up = g[b, t] @ params["gate_up"][:, expert[b, t, c]].astype(np.float64)
        hidden = gate / (1 + np.exp(-gate)) * up
        wanted[b, t] += weight[b, t, c] * hidden @ params["down"][expert[b, t, c]]
    tolerances.assert_close(out, wanted, "kernel")
    assert float(stats.dropped) == (~kept).sum() > 0


@pytest.mark.multidevice
def test_a_global_router_drops_less_on_skewed_groups():
    """Eight devices whose tokens each favour other experts: the batch as a whole is balanced."""
    done = subprocess.run([sys.executable, "-m", "tests.parallel.capacity_worker"],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report) == 6
    for name, share in report.items():
        assert 0 <= share["global"] < share["local"] < 1, name
