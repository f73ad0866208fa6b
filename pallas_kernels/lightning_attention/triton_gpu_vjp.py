"""The Triton form of lightning attention: its forward and backward passes as one function."""

import functools
from importlib import metadata

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, tuning
from pallas_kernels.lightning_attention import triton_gpu
from pallas_kernels.lightning_attention.parts import without_unread

LEAST_CAPABILITY = 80


def suits(H: int) -> bool:
    """Whether programs traced now run where this form does: GPU, packages and heads."""
    device = tuning.nvidia()
    return (device is not None and device.capability >= LEAST_CAPABILITY
            and H in triton_gpu.HEAD_DIMS and not _missing())


def check(op: str, H: int) -> None:
    """Raises ValueError, in a sentence that begins with `op`, where this form does not run."""
    if (platform := dispatch.platform()) != "gpu":
        raise ValueError(
            f"{op}'s 'triton_gpu' runs on NVIDIA GPUs from Ampere on; this is a {platform}. "
            "Pass implementation=None for the form made for it.")
    device = tuning.nvidia()
    if device is None or device.capability < LEAST_CAPABILITY:
        found = "an unknown GPU" if device is None else f"one of {device.capability / 10}"
        raise ValueError(
            f"{op}'s 'triton_gpu' takes NVIDIA GPUs of compute capability 8.0 or more; this is "
            f"{found}. Pass 'xla' or None.")
    if H not in triton_gpu.HEAD_DIMS:
        raise ValueError(
            f"{op}'s 'triton_gpu' takes heads of {', '.join(map(str, triton_gpu.HEAD_DIMS))}; "
            f"got {H}. Pass 'xla' or None.")
    if missing := _missing():
        raise ValueError(
            f"{op}'s 'triton_gpu' needs jax-triton 0.3 and triton 3.6; "
            f"{' and '.join(missing)} is not here in that release. Install them with: "
            "pip install 'jax-triton==0.3.1' 'triton>=3.6,<3.7'")


@functools.cache
def _missing() -> list[str]:
    """Packages that are not here, or in a release that this form was not made with."""
    wanted = {"jax-triton": "0.3.", "triton": "3.6."}

    def there(name):
        try:
            return metadata.version(name).startswith(wanted[name])
        except metadata.PackageNotFoundError:
            return False

    return [name for name in wanted if not there(name)]


def lightning_attention(q_BTNH, k_BTNH, v_BTNH, slopes_N, state_BNHH, starts_BT, lengths_B):
    """Arguments and results as in the public function.

    Raises ValueError where there is no such GPU to run on, for other heads than of 16, 32, 64 or
    128, and where jax-triton or triton is missing.
    """
    check("lightning_attention", q_BTNH.shape[-1])
    samples_BT = None
    if starts_BT is not None:
        samples_BT = jnp.cumsum(starts_BT, axis=1, dtype=jnp.int32)
    return attention(q_BTNH, k_BTNH, v_BTNH, slopes_N, state_BNHH, samples_BT, lengths_B)


@jax.custom_vjp
def attention(q, k, v, slopes, state, samples, lengths):
    return triton_gpu.forward(q, k, v, slopes, state, samples, lengths)


def _forward(q, k, v, slopes, state, samples, lengths):
    results = attention(q, k, v, slopes, state, samples, lengths)
    return results, (q, k, v, slopes, state, samples, lengths)


def _backward(kept, gradients):
    dq, dk, dv, dstate = backward(*kept, *gradients)
    return dq, dk, dv, None, dstate, None, None


attention.defvjp(_forward, _backward)


def backward(q_BTNH, k_BTNH, v_BTNH, slopes_N, state_BNHH, samples_BT, lengths_B, dout_BTNH,
             dstate_BNHH, *, config: triton_gpu.Config | None = None):
    """Gradients in q, k, v (in their dtype) and in the incoming state (float32).

    With G the gradient in the state: `dq_t = dO_t S_t^T` walks forward; `dv_t = k_t G_t` and
    `dk_t = v_t G_t^T` walk back, at the same time, so that they share what they read through L2
    (arXiv 2501.08313 §2.2). Nothing is kept from the forward pass but its inputs.
    """
    dout_BTNH = dout_BTNH.astype(q_BTNH.dtype)
    marks = slopes_N, samples_BT, lengths_B
    turned = lambda x: x.swapaxes(-1, -2)  # noqa: E731
    (dq,), _ = triton_gpu.run(
        ((dout_BTNH, v_BTNH, k_BTNH),), marks[0], (turned(state_BNHH),), *marks[1:],
        reverse=False, config=config)
    roles = (k_BTNH, q_BTNH, dout_BTNH), (v_BTNH, dout_BTNH, q_BTNH)
    (dv, dk), (dstate, _) = triton_gpu.run(
        roles, marks[0], (dstate_BNHH, turned(dstate_BNHH)), *marks[1:], reverse=True,
        config=config)
    return dq, dk, dv, without_unread(dstate, samples_BT, lengths_B)
