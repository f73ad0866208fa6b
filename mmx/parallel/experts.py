"""Experts over a mesh: which way tokens meet them, and the program of one device."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mmx.parallel import capacity as capacities
from mmx.parallel import sums
from mmx.parallel.exchange import ROOM, exchange_experts
from mmx.parallel.ops import Ops
from mmx.sharding.rules import axes_of, turned_specs
from pallas_kernels import dispatch, tuning
from pallas_kernels.grouped_matmul.stacked import Stacked
from pallas_kernels.quantized import QuantizedTensor, TurnedTensor

METHODS = SUM, PADDED, RAGGED = "sum", "all_to_all", "ragged"
# A group reads the weights of its experts anew: so many rows each hide that behind their products.
GROUP_ROWS = 512


def over_mesh(ops, run: Callable, g_BTD, weight_BTk, expert_BTk, gate_up, down, inference: bool,
              capacity: float):
    """As `Ops.experts`, by one program per device of `ops.mesh`, a `MeshOps`.

    By "sum" every device of the expert axis sees its group's tokens and adds its experts' part; by
    "all_to_all" and "ragged" tokens that lie over that axis are sent to their experts and back
    (`exchange`). The expert ids that `run` is given count from the device's first; ids outside are
    others'.
    """
    E, k = down.shape[0], expert_BTk.shape[-1]
    owners = axes_of(ops.rules, ops.mesh, "expert", E)
    width = axes_of(ops.rules, ops.mesh, "mlp", down.shape[1], owners)
    # Tokens are whole along the axes over which experts lie.
    shared = (*owners, *width)
    tokens = ops.spec(g_BTD.shape, "batch", "time", None)
    apart = P(*(_without(entry, shared) for entry in tokens))
    parts = _count(ops.mesh, owners)
    local_E = E // parts
    spread = [name for part in tokens for name in names_of(part)]
    local_pairs = expert_BTk.size // _count(ops.mesh, spread)
    most = None
    if capacity:  # pairs that an owner can be sent
        local = _router(ops) == capacities.LOCAL
        most = local_E * (parts * capacities.size(capacity, local_pairs, E) if local
                          else capacities.size(capacity, expert_BTk.size, E))

    def body(g, weight, expert, gate_up, down):
        if owners:
            expert = expert - jax.lax.axis_index(owners) * local_E
            mine = (expert >= 0) & (expert < local_E)
            # An id of nobody's sorts behind all groups and selects no row.
            weight, expert = jnp.where(mine, weight, 0.0), jnp.where(mine, expert, local_E)
        out = Ops.experts(ops, run, g, weight, expert, gate_up, down)
        if back == apart:
            return jax.lax.psum(out, shared) if shared else out
        added = [(axis, tuple(name for name in names_of(entry) if name in shared))
                 for axis, entry in enumerate(back[:2])]
        for axis, names in [one for one in added if one[1]]:
            out = sums.keep_piece(out, names, axis, g.dtype, form)
        return out.astype(g.dtype)  # before it is gathered

    def exchanged(g, weight, expert, gate_up, down):
        flat = (x.reshape(-1, x.shape[-1]) for x in (g, weight, expert))
        out = exchange_experts(
            lambda *rows: run(*rows, gate_up, down), *flat, local_E, owners,
            tuple(ops.mesh.axis_names), width=width, form=method, limit=most, split=split,
            groups=groups, inference=inference, apart=back != tokens)
        if back == tokens or split:
            return out.reshape(g.shape[0], -1, g.shape[2])
        return sums.keep_piece(out.reshape(g.shape), width, 1, g.dtype, form).astype(g.dtype)

    entry = _entry(owners), _entry(width)
    weights = (leaf_spec(gate_up, P(None, entry[0], None, entry[1])),
               leaf_spec(down, P(entry[0], entry[1], None)))
    method = _method(ops, bool(owners) and set(owners) <= set(spread), parts, k,
                     local_pairs, not (inference or capacity))
    lie, island, shared = (apart, body, shared) if method == SUM else (tokens, exchanged, width)
    held = g_BTD.shape[0] * g_BTD.shape[1] // _count(
        ops.mesh, [name for entry in lie for name in names_of(entry)])
    form = sums.form(ops, held) if inference else sums.WHOLE
    back = lie if form == sums.WHOLE else _pieces(ops, g_BTD.shape, tokens, lie, shared)
    if method != SUM:
        split, groups = _split(ops, owners, local_pairs), _groups(ops, local_pairs // local_E)
        rows = g_BTD.shape[0] // _count(ops.mesh, names_of(lie[0]))
        if split and (rows > 1 or held % (_count(ops.mesh, width) * groups)):
            back = lie  # a device's part of the tokens is no piece of each row's time
    return ops._island(island, (lie, lie, lie, *weights), back)(
        g_BTD, weight_BTk, expert_BTk, gate_up, down)


def _pieces(ops, shape, tokens: P, apart: P, shared) -> P:
    """How sums over the axes `shared` lie where each device adds a piece of many tokens: as near to
    `tokens` as can be; `apart`, whole sums on all, where that does not divide.
    """
    rows, time = names_of(tokens[0]), names_of(tokens[1])
    back = {name: axis for axis, names in ((1, shared), (0, rows), (1, time))
            for name in names if name in shared}
    order = sorted(shared, key=lambda name: (*rows, *time, *shared).index(name))
    entries = [(*names_of(apart[axis]), *(name for name in order if back[name] == axis))
               for axis in (0, 1)]
    if (not shared or entries[0] != rows or entries[1][:len(time)] != time
            or shape[1] % _count(ops.mesh, entries[1])):
        return apart
    return P(*map(_entry, entries), *apart[2:])


def within_capacity(ops, expert_BTk, valid_BT, num_experts: int, capacity: float):
    """As `Ops.within_capacity`: of the whole batch, or by the router "local" of each device."""
    spec = ops.spec(expert_BTk.shape, "batch", "time", None)
    rows, pieces = (names_of(entry) for entry in spec[:2])
    whole = expert_BTk.size
    if _router(ops) == capacities.LOCAL:
        rows, pieces, whole = (), (), 0

    def body(expert, *valid):
        return capacities.within(expert, *(valid or (None,)), num_experts, capacity, whole, rows,
                                 pieces)

    given = (expert_BTk,) if valid_BT is None else (expert_BTk, valid_BT)
    return ops._island(body, (spec, P(*spec[:2]))[:len(given)], spec)(*given)


def _method(ops, possible: bool, parts: int, k: int, pairs: int, trained: bool) -> str:
    """The named way, or that of less traffic; `pairs` are those of a device's own tokens.

    To sum, all of a group's tokens go to each of its devices and their sums go round in float32.
    """
    method = ops.names.get("dispatch")
    if method is None:
        ragged = _has_ragged()
        if not possible or trained or parts <= ROOM * k and not (ragged and pairs >= sums.MANY):
            return SUM
        return RAGGED if ragged else PADDED
    if method not in METHODS:
        raise ValueError(f"dispatch='{method}' is not one of {', '.join(map(repr, METHODS))}.")
    return method if possible else SUM


def _has_ragged() -> bool:
    """Not XLA for CPUs, and not its v5e: "not supported in limited ICI routing settings" (8x8)."""
    return dispatch.platform() != "cpu" and tuning.chip() != "v5e"


def _split(ops, owners, pairs: int) -> bool:
    """Whether each device of an expert's width sends its part of the tokens alone ("part").

    Rows then travel once over the experts' axis, and are gathered over the width with the room that
    is kept for more than an even share. That pays where the first is slow: between hosts, and on
    a torus of TPUs along a side of 8 or more, which a row crosses a quarter of.
    """
    named = ops.names.get("rows")
    if named is not None:
        if named not in ("part", "all"):
            raise ValueError(f"rows='{named}' is not one of 'part', 'all'.")
        return named == "part"
    if dispatch.platform() == "tpu":
        far = _count(ops.mesh, owners) >= 8
    else:
        devices = ops.mesh.devices[tuple(
            slice(None) if name in owners else 0 for name in ops.mesh.axis_names)]
        far = len({device.process_index for device in devices.flat}) > 1
    return far and pairs >= sums.MANY


def _router(ops) -> str:
    router = ops.names.get("router", capacities.GLOBAL)
    if router not in (capacities.GLOBAL, capacities.LOCAL):
        raise ValueError(f"router='{router}' is not one of 'global', 'local'.")
    return router


def _groups(ops, rows: int) -> int:
    """Groups of tokens; `rows` are those of one expert if all get the same."""
    named = ops.names.get("groups")
    if named is not None:
        return int(named)
    return 1 if dispatch.platform() == "cpu" or rows < 2 * GROUP_ROWS else 2


def _count(mesh, names) -> int:
    return math.prod(mesh.shape[name] for name in names)


def _entry(axes):
    return axes if len(axes) > 1 else axes[0] if axes else None


def names_of(entry) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else entry


def _without(entry, names):
    return _entry(tuple(name for name in names_of(entry) if name not in names))


def leaf_spec(leaf, spec: P):
    """The spec of a plain leaf, of an int8 leaf's values and scale, or of such inside a stack.

    `spec` is by the plain axes, also for a turned leaf. A scale is whole along the axes where it
    is 1.
    """
    if isinstance(leaf, Stacked):
        return Stacked(leaf_spec(leaf.whole, P(None, *spec)), P())
    if isinstance(leaf, TurnedTensor):
        values, scale = turned_specs(spec, leaf.ndim, leaf.values.ndim - 2, len(leaf.inner))
        return dataclasses.replace(leaf, values=values, scale=scale)
    if not isinstance(leaf, QuantizedTensor):
        return spec
    scale = P(*(None if size == 1 else entry
                for size, entry in zip(leaf.scale.shape, spec, strict=True)))
    return QuantizedTensor(spec, scale)
