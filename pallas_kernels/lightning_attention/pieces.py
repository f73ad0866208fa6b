"""The tokens that last until the end of each part of a sequence, shared out evenly to pieces.

Pieces are whole chunks of one head; a kernel makes the state of each, all at the same time: one
slow head would else keep one multiprocessor busy while the others wait. `reverse` is the walk
towards earlier tokens, whose states lie before a part's first token.
"""

import jax.numpy as jnp

from pallas_kernels.lightning_attention.state import windows


def share_out(slopes_N, first_BP, end_BP, pieces: int, *, T: int, C: int, reverse: bool):
    """int32 [B, P * pieces, N, 4]: first chunk, the one after the last, first token and the one
    after the last, of each piece of each of the parts from `first_BP` to `end_BP`.
    """
    (B, P), (N,) = first_BP.shape, slopes_N.shape
    begin, stop = windows(slopes_N, first_BP.reshape(-1), end_BP.reshape(-1), T, reverse)
    begin, stop = begin // C, jnp.where(begin < stop, -(-stop // C), begin // C)
    share = -(-(stop - begin) // pieces)
    edges = begin[:, None] + jnp.arange(pieces + 1, dtype=jnp.int32)[:, None] * share[:, None]
    edges = jnp.minimum(edges, stop[:, None]).reshape(B, P, pieces + 1, N)
    tokens = (jnp.broadcast_to(x[..., None, None], (B, P, pieces, N)) for x in (first_BP, end_BP))
    table = jnp.stack([edges[:, :, :-1], edges[:, :, 1:], *tokens], axis=-1)
    return table.reshape(B, P * pieces, N, 4).astype(jnp.int32)


def put_together(local, table_BQN4, slopes_N, samples_BT, pieces: int, *, C: int, reverse: bool):
    """The states of parts, [roles, B, P, N, H, H], from those of their pieces, P * pieces of them.

    samples_BT: of packed rows, the sample of each token: a part's state is of its last one's, in
    reverse of its first one's.
    """
    if pieces == 1:
        return local
    R, B, Q, N, H, _ = local.shape
    begin, stop, first, end = (table_BQN4[..., i] for i in range(4))
    if reverse:
        at, of = begin * C, first
        gap_BQN = at - of
    else:
        at, of = jnp.minimum(stop * C, end), end
        gap_BQN = of - at
        at, of = at - 1, of - 1
    weight_BQN = jnp.exp(-slopes_N * jnp.maximum(gap_BQN, 0).astype(jnp.float32))
    if samples_BT is not None:
        sample, wanted = (jnp.take_along_axis(
            samples_BT, jnp.clip(x, 0, samples_BT.shape[1] - 1).reshape(B, -1), axis=1)
            for x in (at, of))
        weight_BQN = jnp.where((sample == wanted).reshape(B, Q, N), weight_BQN, 0.0)
    # Plain sums of products: exact in float32, and one fusion.
    weighed = weight_BQN[None, ..., None, None] * local
    return weighed.reshape(R, B, Q // pieces, pieces, N, H, H).sum(axis=3)
