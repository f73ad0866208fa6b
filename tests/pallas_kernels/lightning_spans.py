"""Float64 truth of packed and ragged lightning attention, sample by sample."""

import numpy as np

from tests.reference import lightning as f64


def expected(kind, tensors, state, dstate, slopes, starts, lengths):
    """`kind` "forward": (out, state); else (dq, dk, dv, dstate). Zero at padding.

    tensors: q, k, v, dout [B, T, N, H]; `starts` [B, T] bool and `lengths` [B] may be None.
    """
    q, k, v, dout = (np.asarray(x, np.float64) for x in tensors)
    state, dstate = np.asarray(state, np.float64), np.asarray(dstate, np.float64)
    B, T = q.shape[:2]
    results = [np.zeros_like(q) for _ in ("o" if kind == "forward" else "qkv")]
    final = np.zeros_like(state)
    for b in range(B):
        n = T if lengths is None else lengths[b]
        inner = [] if starts is None else [int(t) for t in np.flatnonzero(starts[b][:n])]
        reads_state = inner[:1] != [0]
        bounds = [0, *(inner if reads_state else inner[1:]), n]
        first = state[b] if reads_state else np.zeros_like(state[b])
        if n == 0:
            final[b] = state[b] if kind == "forward" else dstate[b]
            continue
        for i in range(len(bounds) - 1):
            span = slice(bounds[i], bounds[i + 1])
            parts = [x[b, span] for x in (q, k, v, dout)]
            last_one = i == len(bounds) - 2
            if kind == "forward":
                results[0][b, span], last = f64.recurrent(*parts[:3], slopes, first)
                final[b] = last
            else:
                *grads, back = f64.block_gradients(
                    *parts, slopes, first, size=64,
                    state_grad=dstate[b] if last_one else np.zeros_like(first))
                for result, grad in zip(results, grads, strict=True):
                    result[b, span] = grad
                if i == 0 and reads_state:
                    final[b] = back
            first = np.zeros_like(first)
    return (*results, final)
