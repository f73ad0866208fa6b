"""Ring attention's forward pass by a platform's kernels, in place of blocks in XLA.

Between two pieces of a sequence keys lie before all queries, after them, or are the queries' own.
"""

import jax
import jax.numpy as jnp

from mmx.parallel.collectives import permute
from pallas_kernels import partial_attention
from pallas_kernels.attention.shares import NEG_INF, add


def attend(form, axis, q_BTNH, keys, samples_BT, first_tokens, key_segments: int, ring: bool):
    """Weighted values, weights and peak score of this device's queries over all ranks' keys.

    Args:
      form: implementation of `partial_attention`.
      keys: k, v [B, S, K, H] and samples [B, S] (or None) of this rank if `ring`, else of all, in
        the order of the sequence.
      first_tokens: rank -> the position of the first token of each of the equal segments in which
        its queries, and in a ring its keys, lie.
      key_segments: equal segments of `keys`.
    """
    W, rank = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    queries = first_tokens(rank)
    count = queries.shape[0]

    def parts(x, n):
        return [None] * n if x is None else jnp.split(x, n, axis=1)

    q_parts, sample_parts = parts(q_BTNH, count), parts(samples_BT, count)

    def work(keys, firsts, sums, own):
        """Adds the keys of segments that begin at `firsts`; `own` if queries are among them."""
        key_parts = list(zip(*(parts(x, key_segments) for x in keys), strict=True))
        added = []
        for i, (q, sample, total) in enumerate(zip(q_parts, sample_parts, sums, strict=True)):
            for j, (k, v, key_sample) in enumerate(key_parts):
                if own and ring and j > i:
                    continue  # a rank's segments are in order: these keys are all later
                share = partial_attention(
                    q, k, v, implementation=form, apart=not own or (ring and i != j),
                    offsets_B=jnp.full(q.shape[0], queries[i] - firsts[j], jnp.int32),
                    ends_BS=None if sample is None else _ends(sample, key_sample))
                total = add(total, share)
            added.append(total)
        return added

    sums = [(jnp.zeros(q.shape, jnp.float32), jnp.zeros(q.shape[:3], jnp.float32),
             jnp.full(q.shape[:3], NEG_INF, jnp.float32)) for q in q_parts]
    if not ring:
        sums = work(keys, jnp.zeros(1, jnp.int32), sums, True)
    else:
        # Keys are sent on before the work that needs only what has arrived.
        hops = [(source, (source + 1) % W) for source in range(W)]
        arrived = permute(keys, axis, hops) if W > 1 else None
        sums = work(keys, queries, sums, True)

        def step(i, state):
            keys, sums = state
            return permute(keys, axis, hops), work(keys, first_tokens((rank - i) % W), sums, False)

        if W > 1:
            arrived, sums = jax.lax.fori_loop(1, W - 1, step, (arrived, sums))
            sums = work(arrived, first_tokens((rank - (W - 1)) % W), sums, False)
    return tuple(jnp.concatenate(parts, axis=1) for parts in zip(*sums, strict=True))


def _ends(sample_BT, key_sample_BS):
    """Of each key the number of queries whose sample is not later: later ones do not see it."""
    find = jax.vmap(lambda samples, keys: jnp.searchsorted(samples, keys, side="right"))
    return find(sample_BT, key_sample_BS).astype(jnp.int32)
