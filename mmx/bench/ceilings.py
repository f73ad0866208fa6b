"""What this device does at best: a copy and a large product, measured before all else."""

import jax
import jax.numpy as jnp

from mmx.bench import arrays
from mmx.bench.floors import Ceilings
from mmx.bench.timing import Method, Timing, dispatched, in_turns
from mmx.errors import UserError


def sizes(full: bool) -> tuple[int, int]:
    """Bytes that are copied, and the side of the square product."""
    return (1 << 30, 8192) if full else (1 << 28, 1024)


def measure(full: bool, dtype: str, method: Method, seed: int) -> tuple[Ceilings, list[dict]]:
    """Returns the ceilings and what was measured, as the first records of a run.

    The copy is the faster of a plain one and a negation: on some devices a copy is made by one
    thread or engine. Raises UserError when even that fails.
    """
    count, side = sizes(full)
    numbers = arrays.values(arrays.named_key(seed, "copy"), (count // 4,), jnp.float32)
    a, b = (arrays.values(arrays.named_key(seed, name), (side, side), dtype) for name in "ab")
    found = in_turns({
        "copy": lambda: dispatched(jax.jit(jnp.copy), numbers),
        "negation": lambda: dispatched(jax.jit(jnp.negative), numbers),
        "product": lambda: dispatched(jax.jit(jnp.matmul), a, b),
    }, method)
    for name, one in found.items():
        if isinstance(one, str):
            raise UserError(f"This device's {name} could not be measured: {one}",
                            "Floors are reckoned from it.", "Free its memory and try again.")
    moved, done = 2 * count, 2 * side**3
    copy = min((found["copy"], found["negation"]), key=lambda one: one.median)
    ceilings = Ceilings(moved / copy.median, done / found["product"].median, dtype)
    return ceilings, [
        _record("ceiling_copy", f"{moved >> 20} MiB", "float32", copy, ceilings.copy / 1e9,
                "GB/s"),
        _record("ceiling_product", f"{side}x{side}x{side}", dtype, found["product"],
                ceilings.product / 1e12, "TFLOP/s")]


def _record(operation: str, shape: str, dtype: str, timing: Timing, rate: float, unit: str):
    from mmx.bench.records import record

    return record(operation, shape, {}, dtype, "xla", timing, None, rate=rate, rate_unit=unit)
