"""Memory figures of this process: host peak, and device peak where the backend tells it."""

import sys


def host_peak_bytes() -> int:
    """Returns the largest resident size of this process so far, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_peak_bytes() -> int | None:
    """Returns the largest use of one local device so far, in bytes; None where not counted."""
    import jax

    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [one["peak_bytes_in_use"] for one in stats if one and "peak_bytes_in_use" in one]
    return max(peaks) if peaks else None


def human(size: float) -> str:
    """Writes bytes for people: "512 B", "1.2 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def summary() -> str:
    """Returns "peak memory 1.2 GiB" of the host, with the device's where it is counted."""
    text = f"peak memory {human(host_peak_bytes())}"
    device = device_peak_bytes()
    return text if device is None else f"{text} host, {human(device)} device"
