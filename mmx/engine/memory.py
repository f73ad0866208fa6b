"""How much memory there is for caches, and how the host's allocator treats what is freed."""

import ctypes
import os
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import jax

from mmx.config import ModelConfig
from mmx.errors import UserError


def available_bytes(devices: Sequence[jax.Device] | None = None) -> int:
    """Returns free bytes over `devices` (all local ones if None), or of the host for CPUs.

    On a host the smaller of what the system and the control group (a container's limit) leave.
    """
    free = 0
    for device in devices or jax.local_devices():
        stats = device.memory_stats() if device.platform != "cpu" else None
        if not stats or "bytes_limit" not in stats:
            return host_bytes()
        free += stats["bytes_limit"] - stats["bytes_in_use"]
    return free


def check_room(name, config: ModelConfig, dtype: str, quantize: str | None) -> None:
    """Refuses weights that the default device cannot hold, before any is fetched or drawn."""
    from mmx.quant import abstract_params

    need = sum(leaf.size * leaf.dtype.itemsize
               for leaf in jax.tree.leaves(abstract_params(config, dtype, quantize)))
    have = available_bytes(jax.local_devices()[:1])
    if need > have:
        raise UserError(f"The weights of {name} need {human(need)} in {quantize or dtype}.",
                        f"{human(have)} are available.",
                        ("Spread" if quantize else "Quantise them to int8, spread")
                        + " them over a mesh, take a smaller model, or free memory.")


def host_bytes() -> int:
    """Returns bytes that a process may still allocate on this host."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):  # counts page cache that can be dropped, too
            free = int(line.split()[1]) * 1024
    limit, used = _read("/sys/fs/cgroup/memory.max"), _read("/sys/fs/cgroup/memory.current")
    if limit.strip().isdigit() and used.strip().isdigit():
        dropped = sum(int(line.split()[1])
                      for line in _read("/sys/fs/cgroup/memory.stat").splitlines()
                      if line.startswith("inactive_file "))
        free = min(free, int(limit) - int(used) + dropped)
    return max(free, 0)


@cache
def one_arena() -> None:
    """Lets all threads of this process share glibc's main heap; elsewhere nothing.

    To be called before jax starts its threads. Other heaps are small, and what does not fit them
    goes back to the system when freed, whatever `keep_freed_memory` says.
    """
    _mallopt(-8, 1)  # M_ARENA_MAX


@cache
def keep_freed_memory() -> None:
    """Lets glibc keep freed memory instead of returning it to the system; elsewhere nothing.

    The CPU backend allocates the temporaries of every step anew: their pages were faulted in again
    each time, a tenth of a prefill's time.
    """
    _mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
    _mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def _mallopt(name: int, value: int) -> None:
    if sys.platform.startswith("linux"):
        try:
            ctypes.CDLL(None).mallopt(name, value)
        except (OSError, AttributeError):
            pass  # another C library than glibc


def human(count: int) -> str:
    """Returns bytes as text with three digits, for example "1.25 GB"."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
        value /= 1000
    raise AssertionError


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
