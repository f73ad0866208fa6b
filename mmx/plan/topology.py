"""Devices of pods that are not there, for compilation alone, and meshes over them."""

import importlib.metadata
import importlib.resources
import importlib.util
import math
import os
import sys
from typing import Any

import numpy as np

from mmx.errors import UserError
from mmx.plan.pods import Pod, wraps


def prepare_environment() -> None:
    """Sets what has to stand before jax starts: its own devices are the host's, not a pod's.

    Raises UserError where jax has already started on an accelerator, as it cannot be turned back.
    """
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"          # no question to a cloud's metadata server
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # two plans at once; no device is held
    os.environ["JAX_PLATFORMS"] = "cpu"             # read when jax is imported
    # Otherwise libtpu complains on stderr that it finds no machine; topologies do not depend on it.
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_WORKER_ID", "0")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    if "jax" in sys.modules and sys.modules["jax"].config.jax_platforms != "cpu":
        sys.modules["jax"].config.update("jax_platforms", "cpu")
        if sys.modules["jax"].default_backend() != "cpu":
            raise UserError("jax has already started on an accelerator.",
                            "Planning compiles for devices that are not there.",
                            "Start a new process with JAX_PLATFORMS=cpu.")


def versions(pod: Pod) -> dict[str, str]:
    """Returns the versions of jax and of the package that holds the pod's compiler."""
    names = ("jax", "libtpu" if pod.chip.platform == "tpu" else "jax-cuda13-plugin")
    return {name: importlib.metadata.version(name) for name in names}


def devices(pod: Pod) -> list[Any]:
    """Returns the pod's devices, slice by slice, as the compiler sees them; none can run.

    Raises UserError without the compiler's package, and where it does not know the topology.
    """
    extra, module = (("plan-tpu", "libtpu") if pod.chip.platform == "tpu"
                     else ("plan-gpu", "jax_cuda13_plugin"))
    if not _importable(module):
        raise UserError(f"Planning for {pod.name} needs the compiler in {module}.",
                        f"It comes with the extra {extra}.",
                        f"Run pip install -e '.[{extra}]' in the clone.")
    from jax.experimental import topologies
    try:
        if pod.chip.platform == "tpu":
            found = topologies.get_topology_desc(
                platform="tpu", topology_name=pod.name.rpartition("*")[2], **_tpu_options(pod))
        else:
            hosts = pod.slices * pod.topology[0]
            found = topologies.get_topology_desc(
                pod.chip.name, platform="cuda", topology=f"1x{hosts}x{pod.topology[1]}",
                target_config=importlib.resources.files("mmx.plan").joinpath(
                    f"{pod.chip.name}.textproto").read_text())
    except Exception as error:
        raise UserError(f"The compiler does not know {pod.name}.",
                        f"It says: {str(error).strip().splitlines()[0]}",
                        f"Take another topology, or a newer {module}.") from error
    return list(found.devices)


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # the name is bound to None
        return False


def _tpu_options(pod: Pod) -> dict[str, Any]:
    # jax lays meshes over v4 only where both cores of a chip are one device.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if pod.chip.name == "v4" else {}
    if math.prod(pod.topology) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if pod.slices > 1:
        options["num_slices"] = pod.slices
    joined = wraps(pod.chip, pod.topology)
    if any(joined):
        options["wrap"] = (*joined, False)[:3]
    return options


def make_mesh(pod: Pod, axes: dict[str, int]) -> Any:
    """Returns a `jax.sharding.Mesh` of the pod's devices with automatic axes in AXES' order.

    Inside a slice neighbours on an axis are neighbours on the torus where that can be had. The
    axis "slice" lies over DCN: over the slices of TPUs, over hosts (or groups of them) of GPUs;
    without it, the first axis takes up the slices. Raises UserError for an unknown axis, for a
    product that is not the number of devices, and for a slice axis that fits no slices.
    """
    from jax.experimental import mesh_utils
    from jax.sharding import AxisType, Mesh

    axes = check_axes(pod, axes)
    grid, parts = np.array(devices(pod), dtype=object), axes.get("slice", 1)
    shape = [size for name, size in axes.items() if name != "slice"]
    if pod.chip.platform == "tpu":
        # Fastest axes last: the innermost axis is the busiest (tensor), it gets whole sides first.
        arranged = [mesh_utils.create_device_mesh(
            shape_of_slice, list(part), allow_split_physical_axes=True)
            for part in np.split(grid, pod.slices)
            for shape_of_slice in [_shape_in_slice(pod, shape, parts)]]
        grid = np.concatenate(arranged)
    grid = grid.reshape(tuple(axes.values()))
    return Mesh(grid, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def _shape_in_slice(pod: Pod, shape: list[int], parts: int) -> list[int]:
    """`shape` within one slice: a mesh without the slice axis lays its first axis over them."""
    if parts > 1 or pod.slices == 1:
        return shape or [1]
    return [shape[0] // pod.slices, *shape[1:]]


def check_axes(pod: Pod, axes: dict[str, int]) -> dict[str, int]:
    """Returns `axes` in AXES' order; raises UserError where they do not lie over the pod."""
    from mmx.sharding.rules import AXES  # imports jax, which is not to start too early

    for name, size in axes.items():
        if name not in AXES or size < 1:
            raise UserError(f"The mesh axis '{name}={size}' is unknown.",
                            f"Axes are {', '.join(AXES)}, their sizes 1 or more.",
                            "For example 'expert=4,tensor=8'.")
    axes = {name: axes[name] for name in AXES if name in axes}
    told = ",".join(f"{name}={size}" for name, size in axes.items())
    total = math.prod(axes.values())
    if not axes or total != pod.devices:
        raise UserError(f"The mesh '{told}' has {total} devices.",
                        f"{pod.name} has {pod.devices}, and all take part.",
                        "Make the product of its sizes equal to that.")
    parts, first = axes.get("slice", 1), next(iter(axes.values()))
    groups = pod.slices if pod.chip.platform == "tpu" else pod.hosts
    if parts > 1 and (groups % parts or (pod.chip.platform == "tpu" and parts != groups)):
        raise UserError(f"The mesh '{told}' has {parts} slices.",
                        f"{pod.name} has {groups}"
                        f"{' hosts' if pod.chip.platform == 'cuda' else ''}.",
                        f"Write slice={groups}." if groups > 1 else "Leave the axis 'slice' out.")
    if parts == 1 and pod.chip.platform == "tpu" and first % pod.slices and pod.slices > 1:
        raise UserError(f"The mesh '{told}' does not lie over {pod.slices} slices.",
                        "Without the axis 'slice' the first axis is laid over them.",
                        f"Begin with slice={pod.slices}.")
    return axes
