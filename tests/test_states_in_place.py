"""States that stay in the stack of all layers give a decode step's own results."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx import cache as caches
from mmx import model
from mmx.config import LIGHTNING, SOFTMAX
from mmx.parallel import ops as own
from pallas_kernels.grouped_matmul.stacked import Stacked
from pallas_kernels.lightning_attention.decode import decodes_in_stack, lightning_decode_stacked
from tests.engine.conftest import tiny_model
from tests.parallel import states_stand_in

CONFIG, PARAMS = tiny_model((LIGHTNING, SOFTMAX) * 2)  # a scan of two repeats
B = 4


def serve(ops):
    cache = jax.tree.map(np.asarray, caches.init_cache(CONFIG, B, 16, "float32"))
    step = jax.jit(partial(model.step, CONFIG, ops=ops))
    random = np.random.default_rng(0)
    for T, lengths in ((8, (8, 3, 8, 1)), (1, (1, 1, 0, 1)), (1, (0, 1, 1, 1))):
        ids = random.integers(1, CONFIG.vocab_size, (B, T)).astype(np.int32)
        logits, cache = step(PARAMS, cache, ids, jnp.array(lengths))
    return logits, [memory["state"] for stack in cache.stacks for memory in stack
                    if "state" in memory]


def test_a_step_with_states_in_their_stack():
    """Over meshes the regimes' tests compare it."""
    wanted = serve(own.Ops())
    with states_stand_in.installed() as calls:
        got = serve(own.Ops())
    assert calls
    active = np.array([1, 2, 3])  # the last step's; an inert row's logits are arbitrary
    np.testing.assert_allclose(got[0][active], wanted[0][active], rtol=1e-5, atol=1e-5)
    for one, other in zip(got[1], wanted[1], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def test_a_named_form_is_kept(monkeypatch):
    monkeypatch.setattr(own, "decodes_in_stack", lambda dtype, H: True)
    assert own.Ops().keeps_states(1, jnp.bfloat16, 128)
    assert not own.Ops().keeps_states(2, jnp.bfloat16, 128)
    assert not own.Ops({"lightning": "xla"}).keeps_states(1, jnp.bfloat16, 128)


def test_elsewhere_it_is_refused():
    assert not decodes_in_stack(jnp.bfloat16, 128)
    x = jnp.zeros((1, 1, 1, 128), jnp.bfloat16)
    states = Stacked(jnp.zeros((2, 1, 1, 128, 128)), jnp.int32(0))
    with pytest.raises(ValueError, match="Hopper generation"):
        lightning_decode_stacked(x, x, x, jnp.ones(1), states)
