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


def prefix(local, incoming, slopes_N, samples_BT, lengths_B, *, T, span, reverse):
    """States at which parts of `span` tokens begin, from those each makes of an empty one.

    local: [roles, B, parts, N, H, H]; incoming: the same with one part.
    """
    _, B, P, N, _, _ = local.shape
    length_B1 = valid_lengths(lengths_B, B, T)[:, None]
    edge_p = jnp.arange(P + 1, dtype=jnp.int32) * span
    edge_Bp = jnp.minimum(edge_p, length_B1)
    first_Bp, end_Bp = edge_Bp[:, :-1], edge_Bp[:, 1:]
    part_P = jnp.arange(P)
    if reverse:  # part p takes from part q behind it
        gap_BPP = first_Bp[:, None, :] - end_Bp[:, :, None]
        feeds_BPP = jnp.broadcast_to(part_P[None, :] > part_P[:, None], gap_BPP.shape)
        gap_BP = length_B1 - end_Bp
    else:
        gap_BPP = first_Bp[:, :, None] - end_Bp[:, None, :]
        feeds_BPP = jnp.broadcast_to(part_P[None, :] < part_P[:, None], gap_BPP.shape)
        gap_BP = first_Bp
    own_BP = jnp.ones((B, P), bool)
    if samples_BT is not None:
        source, target = boundaries(samples_BT, lengths_B, edge_p[:-1], edge_p[1:], reverse)
        # A part of padding alone hands on nothing of its own: its local state is zero.
        feeds_BPP &= source[:, :, None] == target[:, None, :]
        last_B1 = jnp.take_along_axis(samples_BT, jnp.maximum(length_B1 - 1, 0), axis=1)
        own_BP = source == (last_B1 if reverse else 0)

    def weight(gap, mask):
        decay = jnp.exp(-slopes_N * jnp.maximum(gap, 0)[..., None].astype(jnp.float32))
        return jnp.where(mask[..., None], decay, 0.0)

    # Plain sums of products: exact in float32, and one fusion.
    between = weight(gap_BPP, feeds_BPP)[None, ..., None, None] * local[:, :, None]
    return between.sum(3) + weight(gap_BP, own_BP)[None, ..., None, None] * incoming


def without_unread(dstate, samples_BT, lengths_B):
    """The gradient in the incoming state: none where a row begins with a sample of its own."""
    if samples_BT is None:
        return dstate
    reads_B = samples_BT[:, 0] == 0
    if lengths_B is not None:
        reads_B |= lengths_B == 0
    return jnp.where(reads_B[:, None, None, None], dstate, 0.0)
