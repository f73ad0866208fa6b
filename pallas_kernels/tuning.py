"""Block sizes as data: JSON tables by chip, with an entry "any" for chips that have none."""

import functools
import json
import pathlib

import jax

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


def chip() -> str:
    """Returns the short name of the chip that programs traced now will run on; "" if unknown.

    Ahead of time that is the abstract mesh's device, else this process's first one.
    """
    described = jax.sharding.get_abstract_mesh().abstract_device
    kind = described.device_kind if described is not None else jax.devices()[0].device_kind
    return _CHIPS.get(kind, "")


@functools.cache
def table(path: str | pathlib.Path) -> dict:
    """Returns the JSON table in a file, read once."""
    return json.loads(pathlib.Path(path).read_text())


def entry(path: str | pathlib.Path, kernel: str) -> dict:
    """Returns the sizes of `kernel` for the chip at hand: its own over those for any."""
    sizes = table(path)[kernel]
    return {**sizes["any"], **sizes.get(chip(), {})}
