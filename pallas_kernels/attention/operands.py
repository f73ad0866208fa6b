"""What the forms of softmax attention say of operands that they do not take, worded once."""

import jax.numpy as jnp


def dtype_refusal(form: str, q_BTNH, k_BSKH, dtypes=("float32", "bfloat16")) -> str | None:
    """A sentence unless q is of one of `dtypes` and k of the same or a narrower floating type."""
    q, k = jnp.dtype(q_BTNH.dtype), jnp.dtype(k_BSKH.dtype)
    narrower = jnp.issubdtype(k, jnp.floating) and k.itemsize < q.itemsize
    if q.name in dtypes and (k == q or narrower):
        return None
    return (f"attention '{form}' got q of {q} and k of {k}. It takes q of {' or '.join(dtypes)}, "
            "and keys of that type or a narrower one: cast them, or pass 'xla' or None.")
