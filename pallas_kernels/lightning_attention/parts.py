"""A sequence cut into parts or chunks that GPU kernels walk: what lies between them.

`reverse` is the walk towards earlier tokens, of the gradients: a part then takes its state from the
part behind it.
"""

import jax.numpy as jnp


def valid_lengths(lengths_B, B, T):
    """int32 [B] in [0, T]: the tokens of each row."""
    if lengths_B is None:
        return jnp.full((B,), T, jnp.int32)
    return jnp.clip(lengths_B.astype(jnp.int32), 0, T)


def boundaries(samples_BT, lengths_B, first_c, last_c, reverse):
    """Samples that a span of tokens takes its state from and hands its state to, [B, spans].

    `first_c`, `last_c`: positions of the spans' first token and of the one after their last.
    """
    B, T = samples_BT.shape
    length_B1 = valid_lengths(lengths_B, B, T)[:, None]
    at = lambda index: jnp.take_along_axis(samples_BT, jnp.clip(index, 0, T - 1), axis=1)  # noqa: E731
    first_Bc = jnp.broadcast_to(first_c, (B, first_c.shape[0]))
    end_Bc = jnp.minimum(last_c, length_B1)
    if reverse:
        return at(jnp.where(end_Bc < length_B1, end_Bc, length_B1 - 1)), at(first_Bc)
    return jnp.where(first_Bc == 0, 0, at(jnp.minimum(first_Bc, length_B1) - 1)), at(end_Bc - 1)


def chunk_boundaries(samples_BT, lengths_B, C, reverse):
    """Samples of each chunk's incoming and of its outgoing state, [B, chunks] each."""
    first_c = jnp.arange(-(-samples_BT.shape[1] // C), dtype=jnp.int32) * C
    return boundaries(samples_BT, lengths_B, first_c, first_c + C, reverse)


def givers(parts: int, reverse: bool) -> slice:
    """The parts whose state another one takes: all but the last, in reverse all but the first."""
    return slice(1, parts) if reverse else slice(0, parts - 1)


def edges(lengths_B, B, T, span):
    """Positions of the first token of each part of `span` and of the one after its last, [B, P]."""
    edge_p = jnp.arange(-(-T // span) + 1, dtype=jnp.int32) * span
    edge_Bp = jnp.minimum(edge_p, valid_lengths(lengths_B, B, T)[:, None])
    return edge_Bp[:, :-1], edge_Bp[:, 1:]


def prefix(local, incoming, slopes_N, samples_BT, lengths_B, *, T, span, reverse):
    """States at which parts of `span` tokens begin, from those each makes of an empty one.

    local: [roles, B, P - 1, N, H, H], of the parts that `givers` names; incoming: the same of one
    part.
    """
    B = local.shape[1]
    length_B1 = valid_lengths(lengths_B, B, T)[:, None]
    first_BP, end_BP = edges(lengths_B, B, T, span)
    P = first_BP.shape[1]
    given = givers(P, reverse)
    part_P1, part_Q = jnp.arange(P)[:, None], jnp.arange(P)[given]
    if reverse:  # part p takes from part q behind it
        gap_BPQ = first_BP[:, None, given] - end_BP[:, :, None]
        feeds_BPQ = jnp.broadcast_to(part_Q > part_P1, gap_BPQ.shape)
        gap_BP = length_B1 - end_BP
    else:
        gap_BPQ = first_BP[:, :, None] - end_BP[:, None, given]
        feeds_BPQ = jnp.broadcast_to(part_Q < part_P1, gap_BPQ.shape)
        gap_BP = first_BP
    own_BP = jnp.ones((B, P), bool)
    if samples_BT is not None:
        edge_p = jnp.arange(P + 1, dtype=jnp.int32) * span
        source, target = boundaries(samples_BT, lengths_B, edge_p[:-1], edge_p[1:], reverse)
        # A part of padding alone hands on nothing of its own: its local state is zero.
        feeds_BPQ &= source[:, :, None] == target[:, None, given]
        last_B1 = jnp.take_along_axis(samples_BT, jnp.maximum(length_B1 - 1, 0), axis=1)
        own_BP = source == (last_B1 if reverse else 0)

    def weight(gap, mask):
        decay = jnp.exp(-slopes_N * jnp.maximum(gap, 0)[..., None].astype(jnp.float32))
        return jnp.where(mask[..., None], decay, 0.0)

    # Plain sums of products: exact in float32, and one fusion.
    between = weight(gap_BPQ, feeds_BPQ)[None, ..., None, None] * local[:, :, None]
    return between.sum(3) + weight(gap_BP, own_BP)[None, ..., None, None] * incoming


def without_unread(dstate, samples_BT, lengths_B):
    """The gradient in the incoming state: none where a row begins with a sample of its own."""
    if samples_BT is None:
        return dstate
    reads_B = samples_BT[:, 0] == 0
    if lengths_B is not None:
        reads_B |= lengths_B == 0
    return jnp.where(reads_B[:, None, None, None], dstate, 0.0)
