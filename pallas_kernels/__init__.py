"""Kernels of MiniMax-Text-01: lightning attention, grouped matrix products, softmax attention.

Depends on jax and numpy only. Every operation has one public function with all forms behind it;
`implementation=None` chooses one that works here, a named one works or raises.
"""

from pallas_kernels.attention.api import attention as attention
from pallas_kernels.attention.api import partial_attention as partial_attention
from pallas_kernels.attention.ragged_paged import paged_attention as paged_attention
from pallas_kernels.grouped_matmul.api import grouped_matmul as grouped_matmul
from pallas_kernels.lightning_attention.api import lightning_attention as lightning_attention
from pallas_kernels.lightning_attention.decode import (
    lightning_decode_slots as lightning_decode_slots,
)
from pallas_kernels.lightning_attention.state import lightning_state as lightning_state
