"""cuDNN's flash attention on NVIDIA GPUs, through jax.

Without offsets by jax's public function. With offsets a chunk attends to all of its past and
causally to itself; the two are merged by log-sum-exp. The public function rounds that to bfloat16
(3 % of a weight) and wants time before heads, which would copy the cache, so its inner one is
called.

On an H200, 64 heads over 8 of 128: 16,384 queries at an offset of 114,688 at 581 TFLOP/s; 4,096 at
8,192 in 2.58 ms (blocks in XLA: 15.4); decode of 64 rows at 8,192 in 0.498 ms, 4.3 TB/s (2.35), of
one row at 131,000 in 0.141 ms (4.32).
"""

import jax
import jax.extend.backend
import jax.numpy as jnp

from pallas_kernels import dispatch, tuning


def loaded() -> bool:
    """Whether this process runs on NVIDIA GPUs; jax does not start on them without cuDNN."""
    return (jax.default_backend() == "gpu"
            and "cuda" in jax.extend.backend.get_backend().platform_version)


def refusal(q_BTNH, k_BSKH, samples_BT) -> str | None:
    """Says in a sentence why cuDNN does not take these arguments; None if it does."""
    H = q_BTNH.shape[-1]
    if dispatch.platform() != "gpu" or not loaded():
        return ("attention 'cudnn' needs a process that runs on an NVIDIA GPU, with its cuDNN. "
                "Pass 'xla' or None to compile elsewhere.")
    if samples_BT is not None:
        return "attention 'cudnn' has no packed rows. Pass 'xla' or None."
    if q_BTNH.dtype != jnp.bfloat16 or k_BSKH.dtype != jnp.bfloat16:
        return (f"attention 'cudnn' got q of {q_BTNH.dtype} and k of {k_BSKH.dtype}. "
                "It has bfloat16 only: cast them, or pass 'xla' or None.")
    if H > 128 or H % 8:
        return (f"attention 'cudnn' got heads of {H}. They must be a multiple of 8 up to 128; "
                "pass 'xla' or None.")
    return None


def suits(q_BTNH, k_BSKH, offsets_B, samples_BT) -> bool:
    """Whether it is the automatic choice: on GPUs from Ampere on, with offsets on Hopper."""
    if refusal(q_BTNH, k_BSKH, samples_BT):
        return False
    if offsets_B is not None:  # by an inner function of jax, run on this generation alone
        return tuning.hopper()
    capability = jax.local_devices()[0].compute_capability
    return tuple(int(part) for part in capability.split(".")) >= (8, 0)


def attention(q_BTNH, k_BSKH, v_BSKH, offsets_B, samples_BT):
    """As the public function; bfloat16, no packed rows."""
    if sentence := refusal(q_BTNH, k_BSKH, samples_BT):
        raise ValueError(sentence)
    T = q_BTNH.shape[1]
    if offsets_B is None:
        return jax.nn.dot_product_attention(
            q_BTNH, k_BSKH[:, :T], v_BSKH[:, :T], is_causal=True, implementation="cudnn")
    return cached(_cudnn, q_BTNH, k_BSKH, v_BSKH, jnp.asarray(offsets_B, jnp.int32))


def cached(run, q_BTNH, k_BSKH, v_BSKH, offsets_B):
    """Attention at offsets by `run(q, k, v, lengths_B)`, which gives outputs and log-sum-exps.

    `run` is causal if its lengths are None, else all queries see so many keys of each row.
    """
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    if T == 1:
        return run(q_BTNH, k_BSKH, v_BSKH, offsets_B + 1)[0]
    # A row without a past sees one key of what is not its past, and then gives it no weight.
    past, past_lse = run(q_BTNH, k_BSKH, v_BSKH, jnp.maximum(offsets_B, 1))
    past_lse = jnp.where(offsets_B[:, None, None] > 0, past_lse, -jnp.inf)
    # A chunk's padding may stand beyond the cache; nothing valid sees it.
    index_BT = jnp.minimum(offsets_B[:, None] + jnp.arange(T), S - 1)[..., None, None]
    own = (jnp.take_along_axis(x, index_BT, axis=1) for x in (k_BSKH, v_BSKH))
    here, here_lse = run(q_BTNH, *own, None)
    share = jnp.exp(past_lse - jnp.logaddexp(past_lse, here_lse))[..., None]
    out = share * past.astype(jnp.float32) + (1 - share) * here.astype(jnp.float32)
    return out.astype(q_BTNH.dtype)


def _cudnn(q_BTNH, k_BSKH, v_BSKH, lengths_B):
    """Output [B, T, N, H], log-sum-exp [B, T, N] float32."""
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    B, T, _, H = q_BTNH.shape
    # A cache lies heads first: its caller's transposition and these cancel.
    heads_first = (x.swapaxes(1, 2) for x in (q_BTNH, k_BSKH, v_BSKH))
    queries_B = None if lengths_B is None else jnp.full(B, T, jnp.int32)
    out, lse = dot_product_attention(
        *heads_first, q_seqlen=queries_B, kv_seqlen=lengths_B, scale=H**-0.5,
        mask_type=MaskType.CAUSAL if lengths_B is None else MaskType.PADDING,
        qkv_layout="BNTH", return_residual=True)
    return out.swapaxes(1, 2), lse.swapaxes(1, 2)
