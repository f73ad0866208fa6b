"""Block sizes as data: JSON tables by chip, with an entry "any" for chips that have none."""

import functools
import json
import pathlib
import re
from typing import NamedTuple

import jax

from pallas_kernels import dispatch

_CHIPS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "TPU7": "tpu7x",
}
# GPUs by name, for programs compiled for another machine: compute capability 9.0, and all.
_HOPPER = re.compile(r"\bG?H(20|100|200|800)\b")
_NVIDIA = {
    80: re.compile(r"\bA(30|100|800)\b"),
    86: re.compile(r"\bA(2|10|10G|16|40)\b"),
    89: re.compile(r"\bL(4|40|40S|20)\b"),
    90: _HOPPER,
    100: re.compile(r"\bG?B200\b"),
}


def chip() -> str:
    """Returns the short name of the chip that programs traced now will run on; "" if unknown.

    Ahead of time that is the abstract mesh's device, else this process's first one.
    """
    described = jax.sharding.get_abstract_mesh().abstract_device
    kind = described.device_kind if described is not None else jax.devices()[0].device_kind
    return _CHIPS.get(kind, "")


def hopper() -> bool:
    """Whether programs traced now will run on an NVIDIA GPU of the Hopper generation."""
    if dispatch.platform() != "gpu":
        return False
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is None and jax.default_backend() == "gpu":
        return jax.local_devices()[0].compute_capability.startswith("9.")
    return described is not None and bool(_HOPPER.search(described.device_kind))


class Nvidia(NamedTuple):
    """An NVIDIA GPU: its compute capability (80 for 8.0) and multiprocessors."""

    capability: int
    multiprocessors: int


def nvidia() -> Nvidia | None:
    """The NVIDIA GPU that programs traced now will run on; None for another or unknown device."""
    if dispatch.platform() != "gpu":
        return None
    described = jax.sharding.get_abstract_mesh().abstract_device
    device = jax.local_devices()[0] if jax.default_backend() == "gpu" else None
    if device is not None and (described is None or described.device_kind == device.device_kind):
        # Of other makers this is a name.
        number = str(getattr(device, "compute_capability", "")).replace(".", "")
        return Nvidia(int(number), device.core_count) if number.isdecimal() else None
    for capability, name in _NVIDIA.items():
        if described is not None and name.search(described.device_kind):
            return Nvidia(capability, described.num_cores or 108)
    return None


@functools.cache
def table(path: str | pathlib.Path) -> dict:
    """Returns the JSON table in a file, read once."""
    return json.loads(pathlib.Path(path).read_text())


def entry(path: str | pathlib.Path, kernel: str) -> dict:
    """Returns the sizes of `kernel` for the chip at hand: its own over those for any."""
    sizes = table(path)[kernel]
    return {**sizes["any"], **sizes.get(chip(), {})}
