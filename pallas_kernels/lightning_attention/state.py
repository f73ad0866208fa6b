"""The state that a piece of a sequence ends with, without its outputs.

Of tokens that decay by e^-28 (7e-13) until the end nothing is left in a float32 sum: they are not
read. For most heads of the released model that leaves a few hundred tokens of any piece.
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, precision
from pallas_kernels.lightning_attention.api import check
from pallas_kernels.lightning_attention.decode import takes_hopper_kernels

FORGOTTEN = 28.0
# Tokens of all heads whose products XLA makes at once: bounds the temporaries.
SPAN = 2048


def lightning_state(
    k_BTNH: jax.Array,
    v_BTNH: jax.Array,
    slopes_N: jax.Array,
    state_BNHH: jax.Array | None = None,
    *,
    starts_BT: jax.Array | None = None,
    lengths_B: jax.Array | None = None,
    reverse: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """The second result of `lightning_attention`, from only those tokens that last to the end.

    Arguments as there. With `reverse`, the same towards earlier tokens: `sum λ^(t+1) k_t^T v_t`
    over the tokens before the first start, plus `state_BNHH` decayed over the whole row if it has
    no start. With q for k and the outputs' gradients for v that is the gradient in the state before
    the first token, `state_BNHH` being the gradient in the one after the last.

    Args:
      implementation: "reference" and "xla"; "pallas_tpu" and "mosaic_gpu", automatic where
        `lightning_attention` has them, read each head as far back as that head lasts, the others
        all heads as far as the slowest; or None.

    Returns:
      float32 [B, N, H, H]. Differentiable in k, v and the state; its gradient reads all tokens.

    Raises:
      ValueError: shapes or dtypes that do not fit, an unknown implementation, or one that does not
        work here.
    """
    check(k_BTNH, k_BTNH, v_BTNH, slopes_N, state_BNHH, starts_BT, lengths_B)
    B, T, N, H = k_BTNH.shape
    slopes_N = jnp.asarray(slopes_N, jnp.float32)
    default = "xla"
    if dispatch.platform() == "tpu" and H % 128 == 0:
        default = "pallas_tpu"
    elif takes_hopper_kernels(k_BTNH.dtype, H):
        default = "mosaic_gpu"
    run = dispatch.choose("lightning_state", _FORMS, implementation, default, (B, T, N, H))
    count_B = jnp.full((B,), T, jnp.int32)
    if lengths_B is not None:
        count_B = jnp.clip(lengths_B.astype(jnp.int32), 0, T)
    first_B, end_B, cut_B = jnp.zeros_like(count_B), count_B, None
    if starts_BT is not None:
        time_T = jnp.arange(T, dtype=jnp.int32)
        starts_BT = starts_BT & (time_T < count_B[:, None])
        cut_B = starts_BT.any(axis=1)
        if reverse:
            end_B = jnp.where(starts_BT, time_T, count_B[:, None]).min(axis=1)
        else:
            first_B = jnp.where(starts_BT, time_T, 0).max(axis=1)
    own_BNHH = _own(k_BTNH, v_BTNH, slopes_N, first_B, end_B, reverse, run)
    if state_BNHH is None:
        return own_BNHH
    decay_BN = jnp.exp(-slopes_N * count_B[:, None].astype(jnp.float32))
    if cut_B is not None:
        decay_BN = jnp.where(cut_B[:, None], 0.0, decay_BN)
    return own_BNHH + decay_BN[..., None, None] * state_BNHH


def windows(slopes_N, first_B, end_B, T: int, reverse: bool):
    """Where the tokens that matter begin and end, int32 [B, N] each; equal in rows without any."""
    lasting_N = jnp.minimum(FORGOTTEN / jnp.maximum(slopes_N, 1e-30), T).astype(jnp.int32) + 1
    first_BN, end_BN = (jnp.broadcast_to(x[:, None], (x.shape[0], lasting_N.shape[0]))
                        for x in (first_B, jnp.maximum(first_B, end_B)))
    if reverse:
        return first_BN, jnp.minimum(end_BN, first_BN + lasting_N)
    return jnp.maximum(first_BN, end_BN - lasting_N), end_BN


def _weight(time_t, slopes_N, first_B, end_B, reverse):
    """Decays [B, t, N] of tokens at `time_t`, zero outside of rows."""
    inside_Bt = (time_t >= first_B[:, None]) & (time_t < end_B[:, None])
    steps_Bt = jnp.broadcast_to(time_t + 1 if reverse else end_B[:, None] - 1 - time_t,
                                inside_Bt.shape)
    decay_BtN = jnp.exp(-slopes_N * jnp.maximum(steps_Bt, 0)[..., None].astype(jnp.float32))
    return jnp.where(inside_Bt[..., None], decay_BtN, 0.0)


def _product(spec, a, b):
    return jnp.einsum(spec, a, b, precision=precision.for_dtype(a.dtype),
                      preferred_element_type=jnp.float32)


def _reference(k_BTNH, v_BTNH, slopes_N, first_B, end_B, reverse):
    """The definition: every token, times its decay."""
    weight_BTN = _weight(jnp.arange(k_BTNH.shape[1]), slopes_N, first_B, end_B, reverse)
    k, v = (x.astype(jnp.float32) for x in (k_BTNH, v_BTNH))
    return _product("btnh,btng->bnhg", k * weight_BTN[..., None], v)


def _xla(k_BTNH, v_BTNH, slopes_N, first_B, end_B, reverse):
    B, T, N, H = k_BTNH.shape
    span = min(SPAN, T)
    begin_BN, stop_BN = windows(slopes_N, first_B, end_B, T, reverse)
    begin = jnp.where(begin_BN < stop_BN, begin_BN, T).min()
    count = -(-jnp.maximum(stop_BN.max() - begin, 0) // span)

    def one(i, total_BNHH):
        at = begin + i * span
        # The last span may overlap its neighbour: those tokens are masked as done.
        first = jnp.minimum(at, T - span)
        k, v = (jax.lax.dynamic_slice_in_dim(x, first, span, axis=1) for x in (k_BTNH, v_BTNH))
        weight_BtN = _weight(first + jnp.arange(span), slopes_N, jnp.maximum(first_B, at), end_B,
                             reverse)
        k = (k.astype(jnp.float32) * weight_BtN[..., None]).astype(k.dtype)
        return total_BNHH + _product("btnh,btng->bnhg", k, v)

    return jax.lax.fori_loop(0, count, one, jnp.zeros((B, N, H, H), jnp.float32))


def _pallas_tpu(*arguments):
    # Imported where it is used: Pallas would make every start slower.
    from pallas_kernels.lightning_attention import pallas_tpu_state

    return pallas_tpu_state.state(*arguments)


def _mosaic_gpu(*arguments):
    from pallas_kernels.lightning_attention import mosaic_gpu_state

    return mosaic_gpu_state.state(*arguments)


_FORMS = {"reference": _reference, "xla": _xla, "pallas_tpu": _pallas_tpu,
          "mosaic_gpu": _mosaic_gpu}


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _own(k_BTNH, v_BTNH, slopes_N, first_B, end_B, reverse, run):
    """From an empty state; loops whose length is data, and kernels, are told their gradient."""
    return run(k_BTNH, v_BTNH, slopes_N, first_B, end_B, reverse)


def _own_forward(k_BTNH, v_BTNH, slopes_N, first_B, end_B, reverse, run):
    kept = k_BTNH, v_BTNH, slopes_N, first_B, end_B
    return _own(*kept, reverse, run), kept


def _own_backward(reverse, run, kept, dstate_BNHH):
    k_BTNH, v_BTNH, slopes_N, first_B, end_B = kept
    weight_BTN = _weight(jnp.arange(k_BTNH.shape[1]), slopes_N, first_B, end_B, reverse)
    k, v = (x.astype(jnp.float32) for x in (k_BTNH, v_BTNH))
    dk, dv = (_product(spec, x, dstate_BNHH) * weight_BTN[..., None]
              for spec, x in (("btng,bnhg->btnh", v), ("btnh,bnhg->btng", k)))
    return dk.astype(k_BTNH.dtype), dv.astype(v_BTNH.dtype), None, None, None


_own.defvjp(_own_forward, _own_backward)
