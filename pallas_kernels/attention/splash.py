"""Training's attention on TPU by jax's splash kernels: causal, grouped heads, packed rows.

An adapter: heads before time, time padded to whole blocks, the scale on q, block sizes from data.
Its tables of blocks and the time to make them grow with the square of T, which limits T.

Compiled for v5e, v5p, v6e and tpu7x, forward and backward; compiled, not run.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, tuning
from pallas_kernels.attention.operands import dtype_refusal
from pallas_kernels.costs import kernel_cost

_SIZES = pathlib.Path(__file__).with_name("blocks.json")

LANES = 128


def refusal(q_BTNH, k_BSKH, offsets_B) -> str | None:
    """Says in a sentence why splash does not take these arguments; None if it does."""
    T = q_BTNH.shape[1]
    most = _sizes(q_BTNH.dtype)["most_tokens"]
    if offsets_B is not None:
        return ("attention 'splash' has no offsets. A cache is for 'pallas_tpu': "
                "pass that, 'xla' or None.")
    if sentence := dtype_refusal("splash", q_BTNH, k_BSKH):
        return sentence
    if T > most:
        return (f"attention 'splash' got {T} tokens. Its tables have room for {most}: "
                "split the sequence over devices, or pass 'xla' or None.")
    if dispatch.platform() == "gpu":
        return "attention 'splash' runs on a TPU (interpreted on a CPU). Pass 'cudnn' or None."
    return None


def attention(q_BTNH, k_BSKH, v_BSKH, offsets_B, samples_BT):
    """As the public function, without offsets; on a CPU the kernels are interpreted."""
    if sentence := refusal(q_BTNH, k_BSKH, offsets_B):
        raise ValueError(sentence)
    B, T, N, H = q_BTNH.shape
    block = _block(T, _sizes(q_BTNH.dtype)["block"])
    padded = -(-T // block) * block

    def lay(x_BTNH):
        # Padded keys stand after all tokens, padded queries are cut off: neither is seen.
        x_BNTH = x_BTNH[:, :T].swapaxes(1, 2).astype(q_BTNH.dtype)
        return jnp.pad(x_BNTH, ((0, 0), (0, 0), (0, padded - T), (0, 0)))

    q = lay(q_BTNH.astype(jnp.float32) * H**-0.5)
    if samples_BT is not None:
        samples_BT = jnp.pad(samples_BT, ((0, 0), (0, padded - T)))
    interpret = dispatch.platform() == "cpu"
    out = _splash((N, padded, block, interpret), q, lay(k_BSKH), lay(v_BSKH), samples_BT)
    return out[:, :, :T].swapaxes(1, 2)


def _sizes(dtype) -> dict:
    return tuning.entry(_SIZES, "splash_float32" if dtype == jnp.float32 else "splash")


def _block(T: int, most: int) -> int:
    """The smallest whole number of lanes with which T takes as few blocks as it can."""
    count = -(-T // most)
    return -(-T // (count * LANES)) * LANES


def _divisor(block: int, most: int) -> int:
    """The largest part of `block` in whole lanes that divides it and is at most `most`."""
    units = block // LANES
    return LANES * max(d for d in range(1, units + 1) if units % d == 0 and d * LANES <= most)


def _precision(q):
    # The kernels name no precision: float32 products would be one bfloat16 pass.
    return jax.default_matmul_precision("highest" if q.dtype == jnp.float32 else "default")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _splash(build, q, k, v, samples):
    # Not by _forward, which saves what gradients need.
    with _precision(q), kernel_cost(*_cost(q, build[2])):
        return _kernel(build, q, k, v, samples)


def _forward(build, q, k, v, samples):
    with _precision(q), kernel_cost(*_cost(q, build[2])):
        return jax.vjp(lambda *qkv: _kernel(build, *qkv, samples), q, k, v)


def _backward(build, pull, dout):
    block = _divisor(build[2], _sizes(dout.dtype)["block_back"])
    # The gradient kernels are traced here.
    with _precision(dout), kernel_cost(*_cost(dout, block, back=True)):
        return (*pull(dout), None)


def _cost(q_BNTH, block: int, back: bool = False) -> tuple[float, float]:
    """Operations and bytes of the forward kernel, or of each of the two backward ones.

    Half the square of T, whatever the samples; every block of rows reads the other side anew, head
    by head. Of the seven products backward one kernel has three and the other four: told alike.
    """
    B, N, T, H = q_BNTH.shape
    products, rows = (3.5, 3) if back else (2, 2)
    again = 2 * (T / block + 1) / 2
    return (products * B * N * T * T * H,
            (rows + again) * q_BNTH.size * q_BNTH.dtype.itemsize)


_splash.defvjp(_forward, _backward)


def _kernel(build, q_BNTH, k_BKTH, v_BKTH, samples_BT):
    from jax.experimental.pallas.ops.tpu import splash_attention

    N, T, block, interpret = build
    sizes = _sizes(q_BNTH.dtype)
    back = _divisor(block, sizes["block_back"])
    with jax.ensure_compile_time_eval():  # tables are constants, not a part of the program
        mask = splash_attention.MultiHeadMask([splash_attention.CausalMask((T, T))] * N)
        run = splash_attention.make_splash_mha_single_device(
            mask, interpret=interpret,
            block_sizes=splash_attention.BlockSizes(
                block_q=block, block_kv=block, block_kv_compute=_divisor(block, sizes["at_once"]),
                block_q_dkv=back, block_kv_dkv=back,
                block_kv_dkv_compute=_divisor(back, sizes["at_once"]),
                block_q_dq=back, block_kv_dq=back))
    if samples_BT is None:
        return jax.vmap(run)(q_BNTH, k_BKTH, v_BKTH)
    ids = splash_attention.SegmentIds(samples_BT, samples_BT)
    return jax.vmap(run)(q_BNTH, k_BKTH, v_BKTH, ids)
