"""cuDNN's flash attention on NVIDIA GPUs, through jax.

Without offsets by jax's public function. With offsets a chunk attends to all of its past and
causally to itself; the two are merged by log-sum-exp. The public function rounds that to bfloat16
(3 % of a weight) and wants time before heads, which would copy the cache, so its inner one is
called. Of a cache that lies on several devices each attends to the past that it holds, and to a
chunk's own keys, which all have, in an equal part of the causal triangle.

A narrower cache is cast whole before the call: cuDNN's float8 attention, as jax has it, takes no
lengths and gives no log-sum-exp.

On an H200, 64 heads over 8 of 128: 16,384 queries at an offset of 114,688 at 581 TFLOP/s; 4,096 at
8,192 in 2.58 ms (blocks in XLA: 15.4); decode of 64 rows at 8,192 in 0.498 ms, 4.3 TB/s (2.35), of
one row at 131,000 in 0.141 ms (4.32). On several devices: tested by a stand-in, not run.
"""

import jax
import jax.extend.backend
import jax.numpy as jnp

from pallas_kernels import dispatch, tuning
from pallas_kernels.attention.operands import dtype_refusal
from pallas_kernels.attention.shares import NEG_INF, add


def loaded() -> bool:
    """Whether this process runs on NVIDIA GPUs; jax does not start on them without cuDNN."""
    return (jax.default_backend() == "gpu"
            and "cuda" in jax.extend.backend.get_backend().platform_version)


def refusal(q_BTNH, k_BSKH, packed) -> str | None:
    """Says in a sentence why cuDNN does not take these arguments; None if it does.

    `packed` is what tells samples apart, or None.
    """
    H = q_BTNH.shape[-1]
    if dispatch.platform() != "gpu" or not loaded():
        return ("attention 'cudnn' needs a process that runs on an NVIDIA GPU, with its cuDNN. "
                "Pass 'xla' or None to compile elsewhere.")
    if packed is not None:
        return "attention 'cudnn' has no packed rows. Pass 'xla' or None."
    if sentence := dtype_refusal("cudnn", q_BTNH, k_BSKH, ("bfloat16",)):
        return sentence
    if H > 128 or H % 8:
        return (f"attention 'cudnn' got heads of {H}. They must be a multiple of 8 up to 128; "
                "pass 'xla' or None.")
    return None


def partial_refusal(q_BTNH, k_BSKH, stride, own, ends_BS) -> str | None:
    """As `refusal`, of a share."""
    if q_BTNH.shape[1] > 1 and stride > 1 and own is None:
        return ("attention 'cudnn' has no mask for several queries over every "
                f"{stride}th key. Pass `own`, 'xla' or None.")
    return refusal(q_BTNH, k_BSKH, ends_BS)


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
    k_BSKH, v_BSKH = (x.astype(q_BTNH.dtype) for x in (k_BSKH, v_BSKH))
    if offsets_B is None:
        return jax.nn.dot_product_attention(
            q_BTNH, k_BSKH[:, :T], v_BSKH[:, :T], is_causal=True, implementation="cudnn")
    return cached(_cudnn, q_BTNH, k_BSKH, v_BSKH, jnp.asarray(offsets_B, jnp.int32))


def partial_attention(q_BTNH, k_BSKH, v_BSKH, offsets_B, stride, phase, own, apart, ends_BS):
    """As the public function; bfloat16, no packed rows."""
    if sentence := partial_refusal(q_BTNH, k_BSKH, stride, own, ends_BS):
        raise ValueError(sentence)
    k_BSKH, v_BSKH = (x.astype(q_BTNH.dtype) for x in (k_BSKH, v_BSKH))
    offsets_B = jnp.asarray(offsets_B, jnp.int32)
    if own is None and not apart:
        own = at_queries(k_BSKH, v_BSKH, offsets_B, q_BTNH.shape[1])
    return share(_cudnn, q_BTNH, k_BSKH, v_BSKH, offsets_B, stride, phase, own)


def cached(run, q_BTNH, k_BSKH, v_BSKH, offsets_B):
    """Attention at offsets by `run(q, k, v, lengths_B)`, which gives outputs and log-sum-exps.

    `run` is causal if its lengths are None, else all queries see so many keys of each row.
    """
    if q_BTNH.shape[1] == 1:
        return run(q_BTNH, k_BSKH, v_BSKH, offsets_B + 1)[0]
    own = at_queries(k_BSKH, v_BSKH, offsets_B, q_BTNH.shape[1])
    out, total, _ = share(run, q_BTNH, k_BSKH, v_BSKH, offsets_B, 1, 0, own)
    return (out / total[..., None]).astype(q_BTNH.dtype)


def at_queries(k_BSKH, v_BSKH, offsets_B, T: int):
    """Keys and values at the positions of T queries; padding may stand beyond the cache."""
    S = k_BSKH.shape[1]
    index_BT = jnp.minimum(offsets_B[:, None] + jnp.arange(T), S - 1)[..., None, None]
    return tuple(jnp.take_along_axis(x, index_BT, axis=1) for x in (k_BSKH, v_BSKH))


def share(run, q_BTNH, k_BSKH, v_BSKH, offsets_B, stride, phase, own):
    """One device's share by `run`, as in `cached`; key s stands at s · stride + phase.

    `own` are keys and values [B, T, K, H] at the queries' positions, or None where there are none.
    Devices have equal parts of the causal work: of 2 · stride pieces of the queries one takes the
    piece of its phase and that many from the end. A single query's own key is among those held.
    """
    T = q_BTNH.shape[1]
    sums = _seen(run, q_BTNH, k_BSKH, v_BSKH, -(-(offsets_B + (T == 1) - phase) // stride))
    if T == 1 or own is None:
        return sums
    own = tuple(x.astype(q_BTNH.dtype) for x in own)
    if T % (2 * stride):  # all have all of it, and one device's counts
        out, total, peak = _causal(run, q_BTNH, *own)
        mine = jnp.asarray(phase == 0)
        return add(sums, (out * mine, total * mine, jnp.where(mine, peak, NEG_INF)))
    if stride == 1:
        return add(sums, _causal(run, q_BTNH, *own))
    piece = T // (2 * stride)
    for first in (phase * piece, (2 * stride - 1 - phase) * piece):
        q, *near = (jax.lax.dynamic_slice_in_dim(x, first, piece, 1) for x in (q_BTNH, *own))
        before = _seen(run, q, *own, jnp.full_like(offsets_B, first))
        here = add(before, _causal(run, q, *near))
        there = tuple(jax.lax.dynamic_slice_in_dim(x, first, piece, 1) for x in sums)
        sums = tuple(jax.lax.dynamic_update_slice_in_dim(x, new, first, 1)
                     for x, new in zip(sums, add(there, here), strict=True))
    return sums


def _seen(run, q, k, v, count_B):
    """Sums over the first `count_B` keys of each row, which all queries see."""
    # A row that sees none is given one, and then that no weight.
    out, lse = run(q, k, v, jnp.clip(count_B, 1, k.shape[1]))
    some = (count_B > 0)[:, None, None]
    total = jnp.broadcast_to(some, lse.shape).astype(jnp.float32)
    return out * total[..., None], total, jnp.where(some, lse, NEG_INF)


def _causal(run, q, k, v):
    out, lse = run(q, k, v, None)
    return out.astype(jnp.float32), jnp.ones_like(lse), lse


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
