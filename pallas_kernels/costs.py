"""What a Mosaic GPU kernel costs, said where a reader of the compiled program finds it.

A TPU kernel's `pl.CostEstimate` stands in the program's text; jax drops a GPU kernel's. Its name
scope is kept, so the figures are told there. Without them a reader would take a kernel that reads
one layer of a stack for one that reads all.
"""

import re

import jax

_SCOPE = re.compile(r"kernel_cost_flops_(\d+)_bytes_(\d+)")


def kernel_cost(flops: float, bytes_accessed: float):
    """A context round the kernel's call: its operations, and the bytes it moves in main memory."""
    return jax.named_scope(f"kernel_cost_flops_{int(flops)}_bytes_{int(bytes_accessed)}")


def told(name: str) -> tuple[float, float] | None:
    """(operations, bytes) that an instruction's name tells, None where it tells nothing."""
    found = _SCOPE.findall(name)
    return (float(found[-1][0]), float(found[-1][1])) if found else None
