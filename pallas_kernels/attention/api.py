"""Public function of softmax attention and the choice of its implementation."""

import jax

from pallas_kernels import dispatch, tuning
from pallas_kernels.attention import (
    cudnn,
    cudnn_paged,
    pallas_tpu,
    reference,
    splash,
    xla,
)
from pallas_kernels.grouped_matmul.stacked import Stacked, cut

_IMPLEMENTATIONS = {
    "reference": reference.attention,
    "xla": xla.attention,
    "splash": splash.attention,
    "pallas_tpu": pallas_tpu.attention,
    "cudnn": cudnn.attention,
    "cudnn_paged": cudnn_paged.attention,
}
# Forms for one query a row: nothing times or compares them unless it names them.
BY_NAME = ("cudnn_paged",)
# Forms that read keys and values where they lie in a stack; for others they are cut out.
_IN_PLACE = ("pallas_tpu", "xla", *BY_NAME)
_PARTIAL = {
    "reference": reference.partial_attention,
    "xla": xla.partial_attention,
    "pallas_tpu": pallas_tpu.partial_attention,
    "cudnn": cudnn.partial_attention,
    "cudnn_paged": cudnn_paged.partial_attention,
}


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array | Stacked,
    v_BSKH: jax.Array | Stacked,
    *,
    offsets_B: jax.Array | None = None,
    samples_BT: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Causal softmax attention with grouped key/value heads, scale 1/√H.

    Query head n reads key/value head n // (N / K). Keys lie at positions 0 … S-1; query t of row b
    stands at position `offsets_B[b] + t` and attends to keys at or before it.

    Args:
      q_BTNH, k_BSKH, v_BSKH: float32 or bfloat16; rotation already applied. Scores, softmax and
        sums are float32. Keys and values may be of a narrower type, as a cache holds them, and a
        layer's place in a stack of them.
      offsets_B: int32 position of each row's first query; zeros if None. Keys beyond a row's last
        query may hold anything finite.
      samples_BT: int32 sample number per token for packed rows (T = S, no offsets): tokens attend
        within their sample only.
      implementation: "reference" (all scores at once), "xla" (blocks), "splash" (TPU, no offsets),
        "pallas_tpu" (TPU, any offsets, forward only), "cudnn" (NVIDIA, bfloat16, not packed),
        "cudnn_paged" (one query a row at offsets, in place; automatic on Hopper for a stack), or
        None. A CPU interprets the TPU's kernels, slowly. Not to be called with
        sharded operands outside `jax.shard_map`, where a kernel would have to be split.

    Returns:
      Output [B, T, N, H] in q's dtype. Differentiable in q, k and v when `offsets_B` is None.

    Raises:
      ValueError: shapes that do not fit, or an implementation that is unknown or does not take
        these arguments or this platform.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    if k_BSKH.shape != v_BSKH.shape or k_BSKH.shape != (B, S, K, H) or N % K:
        raise ValueError(
            f"q {q_BTNH.shape}, k {k_BSKH.shape} and v {v_BSKH.shape} must be [B, T, N, H], "
            "[B, S, K, H] and [B, S, K, H] with K dividing N."
        )
    if samples_BT is not None and (offsets_B is not None or T != S):
        raise ValueError("samples_BT is for packed rows without a cache: T = S, no offsets_B.")
    if offsets_B is None and S < T:
        raise ValueError(f"{T} queries need at least as many keys; got {S}.")
    automatic = implementation or _automatic(q_BTNH, k_BSKH, offsets_B, samples_BT)
    run = dispatch.choose("attention", _IMPLEMENTATIONS, implementation, automatic,
                          (B, T, S, N, K, H))
    return run(q_BTNH, *_taken(automatic, k_BSKH, v_BSKH), offsets_B, samples_BT)


def _taken(form: str, *keys_values):
    """Keys and values as a form takes them."""
    return keys_values if form in _IN_PLACE else tuple(cut(x) for x in keys_values)


def _automatic(q_BTNH, k_BSKH, offsets_B, samples_BT) -> str:
    """The kernels take heads of any size; they were compiled for whole lanes, and known chips."""
    platform, T, H = dispatch.platform(), q_BTNH.shape[1], q_BTNH.shape[-1]
    if platform == "tpu" and H % 128 == 0 and tuning.chip():
        if offsets_B is not None:
            return "xla" if pallas_tpu.refusal(q_BTNH, k_BSKH, samples_BT) else "pallas_tpu"
        # A shorter row would be padded to 128.
        if T >= 128 and splash.refusal(q_BTNH, k_BSKH, offsets_B) is None:
            return "splash"
    if platform == "gpu" and cudnn.suits(q_BTNH, k_BSKH, offsets_B, samples_BT):
        return _by_cudnn(q_BTNH, k_BSKH, offsets_B)
    return "xla"


def _by_cudnn(q_BTNH, k_BSKH, offsets_B) -> str:
    """Shares, whose sums cuDNN gives by pages as well, have not been run so: they are cut out."""
    paged = isinstance(k_BSKH, Stacked) and not cudnn_paged.refusal(q_BTNH, k_BSKH, offsets_B, None)
    return "cudnn_paged" if paged else "cudnn"


def partial_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array | Stacked,
    v_BSKH: jax.Array | Stacked,
    *,
    offsets_B: jax.Array,
    stride: int = 1,
    phase: jax.Array | int = 0,
    own: tuple[jax.Array, jax.Array] | None = None,
    apart: bool = False,
    ends_BS: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One device's share of an attention whose keys lie on several.

    As `attention` with offsets, but key s stands at position `s · stride + phase`, and sums are
    returned instead of their quotient. Shares are merged with m = max of peaks: the output is
    Σ exp(peak - m) · weighted / Σ exp(peak - m) · total.

    Args:
      offsets_B: may be negative: the row's first keys are then later than its first queries.
      own: keys and values [B, T, K, H] at the queries' positions, which are also among those of the
        devices of phases 0 … stride - 1, each once. With them a form may share this part of the
        work out in its own way, so that only the merged shares of one form mean something. "cudnn"
        needs them for T > 1 and stride > 1.
      apart: the caller's word that no key stands at a query's position or between two queries of
        its row.
      ends_BS: int32, of packed rows: key s is seen by queries t < ends_BS[b, s] only. Not by
        "cudnn".

    Returns:
      weighted values [B, T, N, H], their total weight [B, T, N] and peak score [B, T, N], float32.

    Raises:
      ValueError: an implementation that is unknown or does not take these arguments or this
        platform.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    automatic = implementation or partial_form(q_BTNH, k_BSKH, stride, own, ends_BS)
    run = dispatch.choose("partial_attention", _PARTIAL, implementation, automatic,
                          (B, T, S, N, K, H))
    return run(q_BTNH, *_taken(automatic, k_BSKH, v_BSKH), offsets_B, stride, phase, own, apart,
               ends_BS)


def partial_form(q_BTNH, k_BSKH, stride=1, own=None, ends_BS=None) -> str:
    """The name of the form that `partial_attention` takes by itself for these arguments."""
    if dispatch.platform() == "gpu":
        fits = (cudnn.partial_refusal(q_BTNH, k_BSKH, stride, own, ends_BS) is None
                and cudnn.suits(q_BTNH, k_BSKH, (), None))
        return "cudnn" if fits else "xla"
    # A TPU's kernel tells packed rows by `ends_BS`.
    return _automatic(q_BTNH, k_BSKH, (), None)
