"""What a kernel of the GPU or of a library costs, where a reader of the compiled program finds it.

A TPU kernel's `pl.CostEstimate` stands in the program's text; jax drops a GPU kernel's, and most of
its own TPU kernels have none. The name scope is kept, so the figures are told there. Without them a
reader would take a kernel that reads one layer of a stack for one that reads all.
"""

import jax


def kernel_cost(flops: float, bytes_accessed: float):
    """A context round the kernel's call: its operations, and the bytes it moves in main memory.

    `mmx.plan` reads it, and does so without jax.
    """
    return jax.named_scope(f"kernel_cost_flops_{int(flops)}_bytes_{int(bytes_accessed)}")
