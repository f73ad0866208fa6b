"""Accelerators that this machine does not have, though their drivers are installed."""

import glob
import importlib.util
import os
import sys

# TPUs; NVIDIA's GPUs, also under WSL; AMD's.
_DEVICES = ("/dev/accel*", "/dev/vfio*", "/dev/nvidia*", "/dev/dxg", "/dev/kfd")
_DRIVERS = ("libtpu", "jax_cuda13_plugin", "jax_cuda12_plugin")


def skip_absent_accelerators() -> None:
    """Keeps jax from asking drivers that the extras of `mmx plan` bring for their devices.

    Without any they complain on stderr, at length, before the first word of an answer. Platforms
    that the user chose, by JAX_PLATFORMS or `jax.config`, stay. Does not import jax.
    """
    jax = sys.modules.get("jax")
    if "JAX_PLATFORMS" in os.environ or jax and jax.config.jax_platforms:
        return
    if any(map(glob.glob, _DEVICES)) or not any(map(importlib.util.find_spec, _DRIVERS)):
        return
    if jax:
        jax.config.update("jax_platforms", "cpu")
    else:
        os.environ["JAX_PLATFORMS"] = "cpu"
