"""The model over ragged rows through its cache, as an engine would: chunks, then single tokens."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from mmx.cache import init_cache
from mmx.model import step

CHUNK = 256

_prefill = jax.jit(partial(step, logits="all"), static_argnums=0, donate_argnums=2)


@partial(jax.jit, static_argnums=(0, 4))
def _decode(config, params, cache, last_logits_BV, count):
    """`count` argmax tokens [B, count] and each one's lead over the second, per largest logit."""
    def one(carry, _):
        logits_BV, cache = carry
        top_B2 = jax.lax.top_k(logits_BV, 2)[0]
        margin_B = (top_B2[:, 0] - top_B2[:, 1]) / jnp.abs(logits_BV).max(-1)
        ids_B = jnp.argmax(logits_BV, axis=-1)
        logits_BV, cache = step(config, params, cache, ids_B[:, None], jnp.ones_like(ids_B))
        return (logits_BV, cache), (ids_B, margin_B)

    _, (ids, margins) = jax.lax.scan(one, (last_logits_BV, cache), length=count)
    return ids.T, margins.T


def run(config, params, prompts, new_tokens: int, chunk: int = CHUNK):
    """(logits [T, V] per prompt, greedy ids [B, new_tokens], margins [B, new_tokens])."""
    lengths = np.array([len(p) for p in prompts])
    steps = -(-lengths.max() // chunk)
    ids = np.zeros((len(prompts), steps * chunk), np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[:len(prompt)] = prompt
    capacity = steps * chunk + new_tokens
    cache = init_cache(config, len(prompts), capacity, params["embed/weight"].dtype)
    pieces = []
    for first in range(0, steps * chunk, chunk):
        left = np.clip(lengths - first, 0, chunk)
        logits, cache = _prefill(config, params, cache, ids[:, first:first + chunk], left)
        pieces.append(np.asarray(logits))
    logits = np.concatenate(pieces, axis=1)
    last = jnp.asarray(logits[np.arange(len(prompts)), lengths - 1])
    greedy, margins = _decode(config, params, cache, last, new_tokens)
    return [x[:n] for x, n in zip(logits, lengths, strict=True)], np.asarray(greedy), margins
