"""Lightning attention in float64, three ways: recurrent, in blocks, and as one masked product.

One head layout throughout: q, k, v are [T, N, H], slopes [N], states [N, H, H] with key rows and
value columns. Source: MiniMax-01 (arXiv 2501.08313) section 3.2 and the released modelling code;
token t is included undecayed, S_t = exp(-s) S_{t-1} + k_t^T v_t, o_t = q_t S_t.
"""

import math

import numpy as np


def slopes(num_heads: int, layer: int, num_layers: int, rule: str = "official") -> np.ndarray:
    """Decay per token [N] of global layer `layer`, from zero, softmax layers counted.

    "official": the ALiBi head list, with factor 1 - i/(L-1) + 1e-5. "transformers": geometric for
    any head count, with factor 1 - i/(L-1+1e-5) + 1e-5.
    """
    if rule == "transformers":
        heads = [2.0 ** (-8 * (h + 1) / num_heads) for h in range(num_heads)]
        return np.array(heads) * (1 - layer / (num_layers - 1 + 1e-5) + 1e-5)
    power = 2 ** int(math.log2(num_heads))
    heads = [2.0 ** (-8 * (h + 1) / power) for h in range(power)]
    doubled = [2.0 ** (-8 * (h + 1) / (2 * power)) for h in range(2 * power)]
    heads += doubled[0::2][:num_heads - power]
    return np.array(heads) * (1 - layer / max(num_layers - 1, 1) + 1e-5)


def recurrent(q_TNH, k_TNH, v_TNH, slopes_N, state_NHH=None, starts_T=None):
    """Token by token; `starts_T` marks tokens before which the state is cleared."""
    length, heads, width = q_TNH.shape
    decay = np.exp(-np.asarray(slopes_N, np.float64))[:, None, None]
    state = np.zeros((heads, width, v_TNH.shape[-1]))
    if state_NHH is not None:
        state = np.array(state_NHH, np.float64)
    out = np.empty((length, heads, v_TNH.shape[-1]))
    for t in range(length):
        if starts_T is not None and starts_T[t]:
            state = np.zeros_like(state)
        state = decay * state + k_TNH[t, :, :, None].astype(np.float64) * v_TNH[t, :, None, :]
        out[t] = np.einsum("nh,nhj->nj", q_TNH[t].astype(np.float64), state)
    return out, state


def block(q_TNH, k_TNH, v_TNH, slopes_N, state_NHH=None, size: int = 256):
    """In blocks of `size`, the arithmetic of the released prefill code, short last block too."""
    q, k, v = (x.astype(np.float64).transpose(1, 0, 2) for x in (q_TNH, k_TNH, v_TNH))
    s = np.asarray(slopes_N, np.float64)[:, None, None]
    state = np.zeros((q.shape[0], q.shape[2], v.shape[2]))
    if state_NHH is not None:
        state = np.array(state_NHH, np.float64)
    out = np.empty_like(v)
    for start in range(0, q.shape[1], size):
        part = slice(start, min(start + size, q.shape[1]))
        rows = part.stop - part.start
        r = np.arange(1, rows + 1.0)
        gap = r[:, None] - r[None, :]
        mask = np.where(gap >= 0, np.exp(-s * np.maximum(gap, 0)), 0)
        query_decay, key_decay = np.exp(-s * r[:, None]), np.exp(-s * (rows - r[:, None]))
        intra = ((q[:, part] @ k[:, part].transpose(0, 2, 1)) * mask) @ v[:, part]
        out[:, part] = (query_decay * q[:, part]) @ state + intra
        update = (key_decay * k[:, part]).transpose(0, 2, 1) @ v[:, part]
        state = np.exp(-s * rows) * state + update
    return out.transpose(1, 0, 2), state


def dense(q_TNH, k_TNH, v_TNH, slopes_N):
    """(Q K^T * M) V with M_rc = exp(-s (r - c)) on and below the diagonal; no initial state."""
    gap = np.arange(q_TNH.shape[0])[:, None] - np.arange(q_TNH.shape[0])[None, :]
    s = np.asarray(slopes_N, np.float64)[:, None, None]
    mask = np.where(gap >= 0, np.exp(-s * np.maximum(gap, 0)), 0)
    scores = np.einsum("tnh,cnh->ntc", q_TNH.astype(np.float64), k_TNH.astype(np.float64)) * mask
    return np.einsum("ntc,cnh->tnh", scores, v_TNH.astype(np.float64))


def block_gradients(q, k, v, out_grad, slopes_N, state=None, size: int = 256, state_grad=None):
    """Closed-form backward of `block`: (dq, dk, dv, dstate), the last for the initial state.

    A forward scan with the carried state gives dq, a reverse scan with its gradient Z the rest.
    """
    q, k, v, g = (x.astype(np.float64).transpose(1, 0, 2) for x in (q, k, v, out_grad))
    s = np.asarray(slopes_N, np.float64)[:, None, None]
    starts = list(range(0, q.shape[1], size))
    carried = np.zeros((q.shape[0], q.shape[2], v.shape[2])) if state is None else np.array(state)
    reverse = np.zeros_like(carried) if state_grad is None else np.array(state_grad)
    dq, dk, dv = np.empty_like(q), np.empty_like(k), np.empty_like(v)

    def tables(start):
        part = slice(start, min(start + size, q.shape[1]))
        rows = part.stop - part.start
        r = np.arange(1, rows + 1.0)
        gap = r[:, None] - r[None, :]
        mask = np.where(gap >= 0, np.exp(-s * np.maximum(gap, 0)), 0)
        from_start, to_end = np.exp(-s * r[:, None]), np.exp(-s * (rows - r[:, None]))
        return part, mask, from_start, to_end, np.exp(-s * rows)

    for start in starts:
        part, mask, from_start, to_end, whole = tables(start)
        inside = ((g[:, part] @ v[:, part].transpose(0, 2, 1)) * mask) @ k[:, part]
        dq[:, part] = inside + from_start * (g[:, part] @ carried.transpose(0, 2, 1))
        carried = whole * carried + (to_end * k[:, part]).transpose(0, 2, 1) @ v[:, part]
    for start in reversed(starts):
        part, mask, from_start, to_end, whole = tables(start)
        weights = (g[:, part] @ v[:, part].transpose(0, 2, 1)) * mask
        scores = (q[:, part] @ k[:, part].transpose(0, 2, 1)) * mask
        dk[:, part] = (weights.transpose(0, 2, 1) @ q[:, part]
                       + to_end * (v[:, part] @ reverse.transpose(0, 2, 1)))
        dv[:, part] = scores.transpose(0, 2, 1) @ g[:, part] + to_end * (k[:, part] @ reverse)
        reverse = whole * reverse + (from_start * q[:, part]).transpose(0, 2, 1) @ g[:, part]
    return dq.transpose(1, 0, 2), dk.transpose(1, 0, 2), dv.transpose(1, 0, 2), reverse
