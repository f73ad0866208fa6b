"""Logical axes of parameters and activations to axes of a device mesh, one table per regime."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmx.errors import UserError

AXES = ("slice", "data", "sequence", "expert", "tensor")
Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Rules:
    """Mesh axes that share out each logical axis; () leaves it whole.

    Parameters have expert, heads, kv_heads, mlp, vocab, and embed (the model's width, gathered
    where it is used). Activations have batch, rows (the batch where a product needs whole rows),
    time, hidden (the width, at products with a split `embed`), and cache_time (slots of keys).
    """

    expert: Axes = ("expert",)
    heads: Axes = ("tensor",)
    kv_heads: Axes = ("tensor",)
    mlp: Axes = ("tensor",)
    vocab: Axes = ("tensor", "expert")
    embed: Axes = ()
    batch: Axes = ()
    rows: Axes = ()
    time: Axes = ()
    hidden: Axes = ()
    cache_time: Axes = ()


# Keys lie over whatever axes their rows do not, so that those of one row are nowhere whole. The
# axes of rows come first, the slowest: then a row's shares on them interleave to what a device of
# the others holds once rows lie over them (`mmx.parallel.rows`).
_KEYS = ("slice", "data", "expert", "sequence")
# Decoding moves weights, so they lie as thin as they can and the few activations travel: states
# and caches by batch over the expert axis too, the width of attention's products over it.
DECODE = Rules(embed=("expert",), batch=("slice", "data", "expert"), rows=("slice", "data"),
               hidden=("expert",), cache_time=_KEYS)
# Many tokens: attention's weights are gathered where they are used.
PREFILL = Rules(embed=("expert",), batch=("slice", "data", "expert"),
                rows=("slice", "data", "expert"), time=("sequence",), cache_time=_KEYS)
# Fewer sequences than devices: time is shared out, over the axes of rows too where they are free.
LONG = Rules(embed=("expert",), batch=("slice", "data"), rows=("slice", "data"),
             time=("sequence", "expert", "data", "slice"), cache_time=_KEYS)
# Parameters and optimiser state lie over all devices.
TRAIN = Rules(embed=("data", "sequence", "expert"), batch=("slice", "data", "expert"),
              rows=("slice", "data", "expert"), time=("sequence",))
# Experts apart, heads and expert width split; the rest lies whole on every device.
SERVING = Rules()
REGIMES = {"decode": DECODE, "prefill": PREFILL, "long": LONG, "train": TRAIN, "serving": SERVING}

# Fewer key/value heads than devices are copied rather than refused. 200,064 words lie over as many
# axes as divide them, and the width of the two tables over the rest: no row is padding.
_MAY_BE_WHOLE = ("kv_heads", "embed", "vocab")


def axes_of(rules: Rules, mesh: Mesh, logical: str | None, size: int,
            used: Sequence[str] = (), more: Sequence[str] = ()) -> Axes:
    """Returns the longest prefix of a rule's mesh axes, not in `used`, that divides `size`.

    `more` axes are tried after the rule's own.
    """
    names: list[str] = []
    for name in dict.fromkeys((*getattr(rules, logical), *more)) if logical else ():
        parts = mesh.shape.get(name, 1)
        if parts == 1 or name in used:
            continue
        if size % (math.prod(mesh.shape[n] for n in names) * parts):
            break
        names.append(name)
    return tuple(names)


def partition(rules: Rules, mesh: Mesh, shape: Sequence[int],
              logical: Sequence[str | None]) -> PartitionSpec:
    """Returns how an array of `shape` with `logical` axes lies; an axis is used once."""
    used: list[str] = []
    entries: list[Any] = []
    left: Axes = ()
    for size, name in zip(shape, logical, strict=True):
        axes = axes_of(rules, mesh, name, size, used, left if name == "embed" else ())
        used += axes
        if name == "vocab":
            left = rules.vocab
        entries.append(axes if len(axes) > 1 else axes[0] if axes else None)
    return PartitionSpec(*entries)


def turned_specs(spec: PartitionSpec, ndim: int, first: int, count: int
                 ) -> tuple[PartitionSpec, PartitionSpec]:
    """How values and scales of a `TurnedTensor` lie, of which the plain leaf lies by `spec`.

    `ndim` are the plain axes, of which `count` from `first` on are contracted. Each group is one
    axis once turned, of which a device has a piece only if the first of the group was split; raises
    ValueError for another one.
    """
    entries = [*spec, *[None] * (ndim - len(spec))]
    lead, inner, outer = entries[:first], entries[first:first + count], entries[first + count:]
    if any(entry is not None for entry in (*inner[1:], *outer[1:])):
        raise ValueError(f"A leaf that lies by {spec} cannot be turned: a split axis lies inside "
                         "those that become one.")
    return PartitionSpec(*lead, outer[0], inner[0]), PartitionSpec(*lead, outer[0])


def param_shardings(specs: Mapping[str, Any], mesh: Mesh,
                    rules: Rules = SERVING) -> dict[str, NamedSharding]:
    """Returns path -> sharding over `mesh`, whose axes are among `AXES`.

    `specs` are those of `mmx.model.param_specs`: each has a path, a shape and logical axes. Raises
    UserError for a mesh axis of another name, and for a dimension that does not divide.
    """
    check_axes(mesh.shape)
    return {path: NamedSharding(mesh, _checked(spec, mesh, rules))
            for path, spec in specs.items()}


def check_axes(sizes: Mapping[str, int]) -> None:
    """Raises UserError for a mesh axis that no rule uses."""
    for name, size in sizes.items():
        if size > 1 and name not in AXES:
            raise UserError(f"The mesh axis '{name}' is unknown.",
                            f"Axes are {', '.join(AXES)}.", "Rename it, for example 'tensor=8'.")


def _checked(spec, mesh: Mesh, rules: Rules) -> PartitionSpec:
    logical = [None if name == "layers" else name for name in spec.axes]
    if set(logical) == {None, "embed"} or logical == ["embed"]:
        return PartitionSpec()  # a norm's weights: less than the cost of gathering them
    for size, name in zip(spec.shape, logical, strict=True):
        axis = getattr(rules, name) if name else ()
        parts = math.prod(mesh.shape.get(a, 1) for a in axis)
        if size % parts and name not in _MAY_BE_WHOLE:
            raise UserError(
                f"{spec.path}: {size} {name} do not divide over the mesh axis "
                f"'{','.join(axis)}' of {parts} devices.",
                "A sharded dimension is cut into equal parts.",
                f"Make '{','.join(axis)}' a divisor of {size}.")
    return partition(rules, mesh, spec.shape, logical)
