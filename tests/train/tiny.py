"""A model of two layers and batches of random tokens, small enough to compile in seconds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mmx import model
from mmx.config import LIGHTNING, SOFTMAX, preset
from mmx.data.pipeline import Batch

CONFIG = preset("nano").replace(
    vocab_size=260, hidden_size=16, layer_types=(LIGHTNING, SOFTMAX), num_heads=2, num_kv_heads=1,
    head_dim=8, rotary_dim=4, expert_dim=8, num_experts=4)


@functools.cache
def _params(seed):
    return jax.device_get(model.init_params(CONFIG, jax.random.key(seed)))


def params(seed=0):
    """Drawn once: a step may reuse the buffers of what it is given."""
    return jax.tree.map(jnp.asarray, _params(seed))


def batch(rows, seq_len, seed=0, sources=1):
    """Rows of random tokens, each with a second sample starting somewhere and uneven weights."""
    rng = np.random.default_rng(seed)
    starts = np.zeros((rows, seq_len), bool)
    starts[:, 0] = True
    starts[np.arange(rows), rng.integers(1, seq_len, rows)] = True
    return Batch(rng.integers(0, CONFIG.vocab_size, (rows, seq_len + 1)).astype(np.int32), starts,
                 rng.choice([0.0, 1.0, 3.0], (rows, seq_len)).astype(np.float32),
                 (np.arange(rows) % sources).astype(np.int32))
