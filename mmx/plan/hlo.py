"""What a compiled program sends, computes and moves, read from its own text.

Bodies of loops are counted as often as they run, nested ones too; of a conditional's branches the
heaviest counts. A loop whose bounds depend on data counts as often as pieces of what it cuts up
fit (see `open_loops`): for a loop over the blocks of a cache, as if the cache were full. Rounds in
which what found no room is sent to experts count as not running.
"""

import collections
import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from mmx.plan import hlo_bytes, hlo_flops, hlo_text
from mmx.plan.hlo_text import Computation, Instruction, Module, numbers

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all",
         "collective-permute", "collective-broadcast")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of exchange over the same axes with the same bytes.

    `axes` are those mesh axes along which the devices of a group differ, in the mesh's order;
    `group` is the number of devices in a group (less than the axes' product where an axis is cut).
    `bytes` is the whole array on one device in one execution: the result of an all-gather, the
    operand of the others (of a ragged all-to-all the smaller of its two buffers, an upper bound).
    `count` is how often it runs in one run of the program. `shift` is the farthest distance of a
    permute along its axis, the short way round.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: float
    count: int
    group: int
    shift: int = 0

    @property
    def sent(self) -> float:
        """Bytes that one device sends in one execution by the ring algorithm."""
        part = (self.group - 1) / self.group
        return self.bytes * {"all-reduce": 2 * part, "collective-permute": 1.0,
                             "collective-broadcast": 1.0}.get(self.kind, part)


def collectives(text: str, mesh: Any) -> list[Collective]:
    """Returns the exchanges of `text` (`compiled.as_text()`), equal ones added up.

    `mesh` is the mesh that the program was compiled for: a device's number in the text is its place
    in `mesh.devices`. Synchronous forms, `-start` forms, and a TPU's collectives that are spread
    over several fusions each count once. A TPU's fusion of all-reduce and slice is a
    reduce-scatter. Groups of one device send nothing and are left out. Raises ValueError for groups
    in an unknown form.
    """
    module, shape = hlo_text.parse(text), dict(mesh.shape)

    def own(place: Computation, line: Instruction) -> collections.Counter:
        kind = line.op.removesuffix("-start")
        if kind not in KINDS or _continued(place, line):
            return collections.Counter()
        found = _collective(kind, place, line, shape)
        return collections.Counter({found: 1} if found else {})

    total = _total(module, own, lambda counts: sum(c.sent * n for c, n in counts.items()))
    return sorted((dataclasses.replace(found, count=int(count))
                   for found, count in total.items()),
                  key=lambda found: -found.sent * found.count)


def _continued(place: Computation, line: Instruction) -> bool:
    """A TPU repeats a collective in every fusion that overlaps it; its start alone is counted."""
    if "chain_id=" not in line.attributes:
        return False
    return not any(user.target == "AsyncCollectiveStart"
                   for user, _ in place.users.get(line.name, ()))


def _collective(kind: str, place: Computation, line: Instruction,
                shape: dict[str, int]) -> Collective | None:
    total = int(np.prod(list(shape.values())))
    if kind == "collective-permute":
        pairs = np.array(re.findall(r"\{(\d+),(\d+)\}", line.attribute(
            r"source_target_pairs=\{(.*?\})\}") or ""), int).reshape(-1, 2)
        pairs = pairs[pairs[:, 0] != pairs[:, 1]]
        if not len(pairs):
            return None
        groups = pairs
    else:
        groups = replica_groups(line.attributes, total)
        if groups.shape[1] < 2:
            return None
    places = np.stack(np.unravel_index(groups, tuple(shape.values())), -1)
    spread = (places != places[:, :1]).any((0, 1))
    axes = tuple(name for name, differs in zip(shape, spread, strict=True) if differs)
    sizes = [sum(leaf.bytes for leaf in leaves) for leaves in place.operand_leaves(line)]
    size = min(sizes[:2]) if kind == "ragged-all-to-all" else sum(sizes)
    if kind == "collective-permute":
        extent = np.array(list(shape.values()))
        away = np.abs(places[:, 0] - places[:, 1])
        hops = int(np.minimum(away, extent - away).sum(1).max())
        return Collective(kind, axes, size, 1, int(np.prod([shape[a] for a in axes])), hops)
    if kind == "all-gather":
        size *= groups.shape[1]
    if kind == "all-reduce" and _scattered(place, line):
        kind = "reduce-scatter"
    return Collective(kind, axes, size, 1, groups.shape[1])


def _scattered(place: Computation, line: Instruction) -> bool:
    return place.name.startswith("all-reduce-scatter") and all(
        user.op == "dynamic-slice" for user, _ in place.users.get(line.name, ())
    ) and bool(place.users.get(line.name))


def replica_groups(attributes: str, total: int) -> np.ndarray:
    """Returns the groups [groups, devices of one] that an instruction's attributes name.

    Forms: `{{0,1},{2,3}}`, `[2,4]<=[4,2]T(1,0)`, `mesh['a'=2,'b'=4] {'b'}` with parts of axes as
    `'b':(1)2`, and none, which is all of `total` devices.
    """
    match = re.search(r"replica_groups=(.*)", attributes)
    text = match[1] if match else "{}"
    if text.startswith("{}"):
        return np.arange(total)[None]
    if text.startswith("{{"):
        return np.array([[int(number) for number in group.split(",")] for group in
                         re.findall(r"\{([\d,]+)\}", text[:text.index("}}") + 1])])
    if iota := re.match(r"(\[[\d,]+\])<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _iota(iota[2]).reshape(numbers(iota[1]))
    if named := re.match(r"mesh\[([^\]]*)\](.*?)\{([^}]*)\}", text):
        return _named(named[1], named[2], named[3])
    raise ValueError(f"Unknown form of replica groups: {text[:80]}")


def _iota(text: str) -> np.ndarray:
    """Devices in the order `[4,2]T(1,0)`: counted over the sizes, then transposed; flat."""
    sizes, _, order = text.partition("T")
    grid = np.arange(np.prod(numbers(sizes))).reshape(numbers(sizes))
    return (grid.transpose(numbers(order)) if order else grid).reshape(-1)


def _named(sizes: str, order: str, wanted: str) -> np.ndarray:
    extent = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    # A part (before)size of an axis cuts the axis into before x size x after.
    cuts: dict[str, set[int]] = {name: {1, size} for name, size in extent.items()}
    parts = []
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", wanted):
        begin, end = (int(before), int(before) * int(size)) if size else (1, extent[name])
        cuts[name] |= {begin, end}
        parts.append((name, begin, end))
    dims, keep, first = [], [], {}
    for name in extent:
        edges = sorted(cuts[name])
        for low, high in zip(edges, edges[1:], strict=False):
            first[name, low, high] = len(dims)
            dims.append(high // low)
    for name, begin, end in parts:
        keep += [dim for (owner, low, high), dim in first.items()
                 if owner == name and begin <= low and high <= end]
    ids = np.arange(int(np.prod(dims)))
    if "device_ids" in order:
        listed = re.search(r"device_ids=\(([^a-z]*)\)", order)
        if listed is None:
            raise ValueError(f"Unknown order of devices: {order[:80]}")
        ids = _iota(listed[1]) if listed[1].startswith("[") else np.array(numbers(listed[1]))
    others = [dim for dim in range(len(dims)) if dim not in keep]
    grid = ids.reshape(dims or [1]).transpose(others + keep) if dims else ids.reshape(1, 1)
    return grid.reshape(-1, int(np.prod([dims[dim] for dim in keep])))


def dots(text: str) -> float:
    """Operations of one run on one device in matrix products: 2 per multiplication and addition.

    Counts dot, convolution, calls of cuBLAS, and the estimate that a Pallas kernel carries (0
    without one); nothing elementwise.
    """
    return sum(dots_by_type(text).values())


def dots_by_type(text: str) -> dict[str, float]:
    """`dots`, apart by the element type of the first operand ("kernel" for Pallas kernels)."""
    module = hlo_text.parse(text)
    return dict(_total(module, hlo_flops.counted, lambda counts: sum(counts.values())))


def bytes_accessed(text: str) -> float:
    """Bytes that one run on one device reads from and writes to its main memory.

    Operands and results of every fusion and of every line outside one; of arrays that are only
    sliced or updated in place, the slices. Arrays that the compiler put into a TPU's on-chip
    memory do not count, padding of tiles neither: an estimate, not a measurement.
    """
    module = hlo_text.parse(text)
    total = _total(module, lambda place, line: collections.Counter(
        bytes=hlo_bytes.moved(module, place, line)), lambda counts: counts["bytes"], fused=False)
    return float(total["bytes"])


def heaviest(text: str, count: int = 10) -> list[tuple[float, str]]:
    """Returns the `count` lines that move the most bytes in one run: bytes, and what they are.

    For the question why a step reads more than its weights: a copy of a whole stack in a loop, say.
    """
    module = hlo_text.parse(text)
    total = _total(module, lambda place, line: collections.Counter(
        {(place.name, line.name): hlo_bytes.moved(module, place, line)}),
        lambda counts: sum(counts.values()), fused=False)
    told = []
    for (place, name), size in total.most_common(count):
        line = module.computations[place].by_name[name]
        shape = ", ".join(f"{leaf.dtype}{list(leaf.dims)}" for leaf in line.leaves[:2])
        told.append((float(size), f"{line.op} -> {shape} in {place} ({line.source or name})"))
    return told


def open_loops(text: str) -> dict[str, int]:
    """Names of loops whose count the text does not tell, and the most it can be, which is taken."""
    module = hlo_text.parse(text)
    return {line.name: hlo_text.trips(module, place, line)
            for place in module.computations.values() for line in place.lines
            if line.op == "while" and hlo_text.trip_count(module, place, line) is None}


def _total(module: Module, own: Callable[[Computation, Instruction], collections.Counter],
           weight: Callable[[collections.Counter], float],
           fused: bool = True) -> collections.Counter:
    """Adds `own` up over all that the entry runs; `fused` looks into fusions as well."""
    known: dict[str, collections.Counter] = {}

    def of(name: str) -> collections.Counter:
        if name not in known:
            place, total = module.computations[name], collections.Counter()
            for line in place.lines:
                total.update(own(place, line))
                if not line.called or (line.op == "fusion" and not fused):
                    continue
                if line.op in ("while", "conditional") and hlo_text.RARE in line.source:
                    continue
                inner = max((of(called) for called in line.called), key=weight)
                times = 1
                if line.op == "while":
                    times = hlo_text.trips(module, place, line)
                for key, value in inner.items():
                    total[key] += value * times
            known[name] = total
        return known[name]

    return of(module.entry)
