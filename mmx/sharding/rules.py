"""Logical axes of parameters to axes of a device mesh."""

from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmx.errors import UserError

# Serving: experts apart, heads and expert width split; the rest lies whole on every device.
SERVING = {"expert": "expert", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor",
           "vocab": "tensor"}
# Fewer key/value heads than devices are copied rather than refused: they are small.
_MAY_BE_WHOLE = ("kv_heads",)


def param_shardings(specs: Mapping[str, Any], mesh: Mesh,
                    rules: Mapping[str, str] = SERVING) -> dict[str, NamedSharding]:
    """Returns path -> sharding over `mesh`, whose axes are among the values of `rules`.

    `specs` are those of `mmx.model.param_specs`: each has a path, a shape and logical axes. Raises
    UserError for a mesh axis that no rule uses, and for a dimension that does not divide.
    """
    for name, size in mesh.shape.items():
        if size > 1 and name not in rules.values():
            raise UserError(f"The mesh axis '{name}' is unknown.",
                            f"Axes are {', '.join(dict.fromkeys(rules.values()))}.",
                            "Rename it, for example jax.make_mesh((8,), ('tensor',)).")
    return {path: NamedSharding(mesh, _partition(spec, mesh, rules))
            for path, spec in specs.items()}


def _partition(spec, mesh: Mesh, rules: Mapping[str, str]) -> PartitionSpec:
    names = []
    for size, logical in zip(spec.shape, spec.axes, strict=True):
        axis = rules.get(logical)
        parts = mesh.shape.get(axis, 1)
        if size % parts and logical not in _MAY_BE_WHOLE:
            raise UserError(
                f"{spec.path}: {size} {logical} do not divide over the mesh axis '{axis}' "
                f"of {parts} devices.", "A sharded dimension is cut into equal parts.",
                f"Make '{axis}' a divisor of {size}.")
        names.append(axis if parts > 1 and size % parts == 0 else None)
    return PartitionSpec(*names)
