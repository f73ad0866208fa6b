"""Token cross-entropy without the whole [B, T, V] in memory."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Tokens whose float32 logits exist at once: 16,384 × 4,096 is 268 MB, 1,024 × 200,064 is 820 MB.
_LOGITS_AT_ONCE = 1 << 28


class TokenLoss(NamedTuple):
    """Sums over the targets of each row, float32: weighted nll_B (nats), weight_B, plain sums of
    the unweighted nll over targets with weight above 0 (plain_B, targets_B), right_B (targets
    where the largest logit is the target), and z, the weighted sum of logsumexp² over all rows."""

    nll_B: jax.Array
    weight_B: jax.Array
    plain_B: jax.Array
    targets_B: jax.Array
    right_B: jax.Array
    z: jax.Array


def chunk_tokens(tokens: int, vocab_size: int) -> int:
    """The largest divisor of `tokens` whose logits stay within the memory bound."""
    most = max(1, _LOGITS_AT_ONCE // (4 * vocab_size))
    count = -(-tokens // most)
    while tokens % count:
        count += 1
    return tokens // count


def token_loss(head: Callable[[jax.Array], jax.Array], x_BTD: jax.Array, targets_BT: jax.Array,
               weights_BT: jax.Array, vocab_size: int) -> TokenLoss:
    """Masked next-token cross-entropy in float32, in chunks of positions.

    head(x [B, C, D]) gives float32 logits [B, C, V]. Each chunk's logits are dropped and computed
    again in the backward pass, so memory holds one chunk's at a time.
    """
    B, T, _ = x_BTD.shape
    C = max(1, chunk_tokens(B * T, vocab_size) // B) if B * T else 1
    while T % C:
        C -= 1

    @jax.checkpoint
    def one_chunk(x_BCD, targets_BC, weights_BC):
        logits_BCV = head(x_BCD).astype(jnp.float32)
        lse_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        # A comparison and a sum, not a gather: its gradient is no scatter and fuses.
        hit_BCV = targets_BC[..., None] == jnp.arange(vocab_size)
        target_BC = jnp.sum(jnp.where(hit_BCV, logits_BCV, 0.0), axis=-1)
        nll_BC = lse_BC - target_BC
        counted_BC = (weights_BC > 0).astype(jnp.float32)
        right_BC = counted_BC * (target_BC >= jnp.max(logits_BCV, axis=-1))
        total = lambda x_BC: jnp.sum(x_BC, axis=1)  # noqa: E731
        return TokenLoss(total(nll_BC * weights_BC), total(weights_BC),
                         total(nll_BC * counted_BC), total(counted_BC), total(right_BC),
                         jnp.sum(weights_BC * lse_BC**2))

    def chunks(array):
        return jnp.moveaxis(array.reshape(B, T // C, C, *array.shape[2:]), 1, 0)

    if C == T:
        return one_chunk(x_BTD, targets_BT, weights_BT)
    parts = jax.lax.map(lambda args: one_chunk(*args),
                        (chunks(x_BTD), chunks(targets_BT), chunks(weights_BT)))
    return jax.tree.map(lambda part: jnp.sum(part, axis=0), parts)

