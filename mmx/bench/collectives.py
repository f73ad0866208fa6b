"""Time that a step's exchanges take on the devices, read from a trace of the profiler."""

from collections import defaultdict
from collections.abc import Callable, Iterable

from mmx.bench import trace

# NCCL carries all-to-all and permutations as sends and receives.
_KINDS = {"allreduce": "all-reduce", "allgather": "all-gather", "alltoall": "all-to-all",
          "reducescatter": "reduce-scatter", "collectivepermute": "collective-permute",
          "sendrecv": "send-receive", "nccl": "other"}


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


def traced(call: Callable[[], None], steps: int) -> dict[str, float] | None:
    """Milliseconds by kind and step of `call`, which waits for its `steps` steps."""
    found = summed(trace.planes(call))
    return None if found is None else {kind: ms / steps for kind, ms in found.items()}
