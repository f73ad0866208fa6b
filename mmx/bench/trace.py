"""What the devices did during a call, by the profiler: programs by name, their number and time."""

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax


def planes(call: Callable[[], Any]) -> list:
    """Runs `call`, which waits for what it starts, and returns the trace's planes."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            call()
        return [plane for path in Path(folder).rglob("*.xplane.pb")
                for plane in jax.profiler.ProfileData.from_file(str(path)).planes]


def device_events(found: Iterable) -> Iterator[list]:
    """The events of each device that the trace knows; a CPU is none."""
    for plane in found:
        if not plane.name.startswith("/device:") or "CUSTOM" in plane.name:
            continue
        lines = list(plane.lines)
        # Other lines of a GPU repeat what its streams did under the compiler's names.
        own = [line for line in lines if line.name.startswith("Stream")] or [
            line for line in lines if line.name == "XLA Ops"]
        if own:
            yield [event for line in own for event in line.events]


def by_kernel(found: Iterable, steps: int) -> dict[str, Any] | None:
    """Programs of a call of `steps` steps, the longest together first; None without a device.

    Returns:
      busy_ms: of a step, all programs together, the mean of the devices; programs that run side by
        side count in full. launches: programs of a step. kernels: of each name, `per_step`, `us`
        (of one) and `us_per_step`.
    """
    devices, times = 0, defaultdict(list)
    for events in device_events(found):
        devices += 1
        for event in events:
            times[event.name].append(event.duration_ns / 1e3)
    if not devices:
        return None
    share = devices * steps
    kernels = [{"kernel": name, "per_step": len(us) / share, "us": sum(us) / len(us),
                "us_per_step": sum(us) / share} for name, us in times.items()]
    kernels.sort(key=lambda row: -row["us_per_step"])
    return {"busy_ms": sum(row["us_per_step"] for row in kernels) / 1e3,
            "launches": sum(row["per_step"] for row in kernels), "kernels": kernels}
