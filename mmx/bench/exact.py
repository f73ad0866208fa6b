"""The operations in float64 NumPy, from their definitions: what `--check` compares with."""

import numpy as np


def lightning(q, k, v, slopes_N, state, starts, do, dstate):
    """S_t = λ S_{t-1} + k_t^T v_t, o_t = q_t S_t, one token at a time, and its gradients.

    Args are [B, T, N, H], slopes [N], state [B, N, H, H], starts bool [B, T] (λ is 0 there), and
    the gradients of both results.

    Returns:
      dict: out, state, and the gradients dq, dk, dv, dstate.
    """
    B, T, N, H = q.shape
    keep_BTN = np.exp(-slopes_N) * ~starts[..., None]
    # Rows [B, T, N, 1, H] and columns [B, T, N, H, 1], and all is written in place: what a token
    # costs is little beside the passes over the states.
    row, column = (lambda x: x[..., None, :]), (lambda x: x[..., None])
    out, dq, dk, dv = (np.empty((B, T, N, H)) for _ in range(4))
    S, product = state.copy(), np.empty(state.shape)
    for t in range(T):
        S *= keep_BTN[:, t, :, None, None]
        S += np.multiply(column(k[:, t]), row(v[:, t]), out=product)
        np.matmul(row(q[:, t]), S, out=row(out[:, t]))
        np.matmul(S, column(do[:, t]), out=column(dq[:, t]))
    dS = dstate.copy()
    for t in reversed(range(T)):
        dS += np.multiply(column(q[:, t]), row(do[:, t]), out=product)
        np.matmul(dS, column(v[:, t]), out=column(dk[:, t]))
        np.matmul(row(k[:, t]), dS, out=row(dv[:, t]))
        dS *= keep_BTN[:, t, :, None, None]
    return {"out": out, "state": S, "dq": dq, "dk": dk, "dv": dv, "dstate": dS}


def grouped(x_MD, w_EDF, sizes_E):
    """Rows by groups, each times its own matrix; rows beyond the groups are zero."""
    out = np.zeros((x_MD.shape[0], w_EDF.shape[2]))
    ends_E = np.cumsum(sizes_E)
    for end, size, w in zip(ends_E, sizes_E, w_EDF, strict=True):
        out[end - size:end] = x_MD[end - size:end] @ w
    return {"out": out}


def attention(q, k, v, offsets_B):
    """Query t of row b attends to keys 0 … offsets_B[b] + t; grouped heads, scale 1/√H."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    k, v = (np.repeat(x, N // K, axis=2) for x in (k, v))
    scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(H)
    seen = np.arange(S) <= (offsets_B[:, None] + np.arange(T))[..., None]
    scores = np.where(seen[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return {"out": np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)}
