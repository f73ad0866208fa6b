"""Time that a step's exchanges and programs take on the devices, from a trace of the profiler."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from mmx.bench import trace

# NCCL carries all-to-all and permutations as sends and receives; XLA's own sums have jax's name.
_KINDS = {"allreduce": "all-reduce", "allgather": "all-gather", "alltoall": "all-to-all",
          "reducescatter": "reduce-scatter", "collectivepermute": "collective-permute",
          "sendrecv": "send-receive", "psum": "all-reduce", "nccl": "other"}
_LISTED = 12  # programs


def kind_of(name: str) -> str | None:
    """The exchange that an event of this name is, or None."""
    flat = name.lower().replace("-", "").replace("_", "")
    return next((kind for word, kind in _KINDS.items() if word in flat), None)


def summed(planes: Iterable) -> dict[str, float] | None:
    """Milliseconds by kind, the mean of the devices; None without a device's plane.

    Exchanges that run side by side, or beside products, count in full.
    """
    found: dict[str, float] = defaultdict(float)
    devices = 0
    for events in trace.device_events(planes):
        devices += 1
        for event in events:
            kind = kind_of(event.name)
            if kind is not None:
                found[kind] += event.duration_ns / 1e6
    return {kind: ms / devices for kind, ms in sorted(found.items())} if devices else None


def traced(call: Callable[[], None], steps: int) -> dict[str, Any]:
    """Facts of a step of `call`, which waits for its `steps` steps; None where nothing is known.

    Returns:
      collectives_ms: by kind. programs: as `trace.by_kernel`, the longest ones.
    """
    planes = trace.planes(call)
    spent, programs = summed(planes), trace.by_kernel(planes, steps)
    if programs is not None:
        programs["kernels"] = programs["kernels"][:_LISTED]
    return {"collectives_ms": spent and {kind: ms / steps for kind, ms in spent.items()},
            "programs": programs}
