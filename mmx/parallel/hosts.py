"""What the processes of a job tell each other over their devices; all call these together."""

from collections.abc import Sequence

import jax
import numpy as np


def from_main(ids: Sequence[int] | None) -> list[int]:
    """Returns the numbers (int32) that process 0 gives; what others give does not matter."""
    if jax.process_count() == 1:
        return list(ids)
    from jax.experimental import multihost_utils

    main = jax.process_index() == 0
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(ids) if main else 0)))
    mine = np.asarray(ids, np.int32) if main else np.zeros(count, np.int32)
    return np.asarray(multihost_utils.broadcast_one_to_all(mine)).tolist()


def smallest(number: int) -> int:
    """Returns the smallest of the numbers from 0 to 2^54 that the processes give."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    halves = np.asarray(divmod(number, 1 << 24), np.int32)  # jax's integers have 32 bits
    return min((int(high) << 24) + int(low)
               for high, low in multihost_utils.process_allgather(halves).reshape(-1, 2))
