"""What cuDNN computes, for machines without it."""

import jax
import jax.numpy as jnp


def run(q, k, v, lengths_B):
    """Outputs in q's dtype and log-sum-exps in float32, as `cudnn._cudnn`."""
    T, S, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    mask = (jnp.tril(jnp.ones((1, T, S), bool)) if lengths_B is None
            else jnp.arange(S) < lengths_B[:, None, None])
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
    scores = jnp.where(mask[:, None], scores, -jnp.inf)
    out = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, -1), v)
    return out, jax.nn.logsumexp(scores, -1).swapaxes(1, 2)


def run_paged(q_BNTH, k_PKSH, v_PKSH, lengths_B, table_B1P1, sums):
    """As `cudnn_paged._cudnn`: a row's pages side by side."""
    def gathered(x_PKSH):
        pages = x_PKSH[table_B1P1[:, 0, :, 0]]  # [B, P, K, S, H]
        B, P, K, S, H = pages.shape
        return jnp.moveaxis(pages, 2, 3).reshape(B, P * S, K, H)

    out, lse = run(q_BNTH.swapaxes(1, 2), gathered(k_PKSH), gathered(v_PKSH), lengths_B)
    return out.swapaxes(1, 2), lse.swapaxes(1, 2) if sums else None


def install(cudnn) -> None:
    """Lets the module `cudnn` run by it for the rest of this process, whatever the dtype."""
    cudnn._cudnn, cudnn.refusal = run, lambda *arguments: None
