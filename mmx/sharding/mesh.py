"""Device meshes by name."""

import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from mmx.errors import UserError
from mmx.sharding.rules import check_axes


def parse_axes(text: str) -> dict[str, int]:
    """Returns the sizes by axis that "expert=4,tensor=8" names, in its order.

    Raises UserError for text of another form, or an axis named twice.
    """
    axes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (word.strip() for word in part.partition("="))
        if not name.isidentifier() or not size.isdecimal() or int(size) < 1 or name in axes:
            raise UserError(f"'{text}' does not describe a mesh.",
                            "It is AXIS=SIZE, with commas between different axes.",
                            "For example 'tensor=8' or 'expert=4,tensor=2'.")
        axes[name] = int(size)
    return axes


def parse_mesh(text: str) -> Mesh:
    """Returns the mesh that `text` describes, for example "tensor=8" or "expert=4,tensor=2".

    The axes are laid over the first devices of all processes in their order, the last axis
    changing fastest; over the whole of a TPU slice as its torus suits. Raises UserError for text
    of another form, an axis unknown or named twice, or more devices than there are.
    """
    axes = parse_axes(text)
    check_axes(axes)
    need, devices = math.prod(axes.values()), jax.devices()
    if need > len(devices):
        raise UserError(f"The mesh '{text}' needs {need} devices.",
                        f"There are {len(devices)}.", "Lower its sizes, or start on more devices.")
    if devices[0].platform == "tpu" and need == len(devices):
        # Neighbours on an axis are neighbours on the torus where that can be had.
        grid = mesh_utils.create_device_mesh(
            tuple(axes.values()), devices, allow_split_physical_axes=True)
    else:
        grid = np.asarray(devices[:need]).reshape(tuple(axes.values()))
    return Mesh(grid, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
