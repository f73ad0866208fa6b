"""Main-memory traffic of single instructions of a compiled program."""

import re

from mmx.plan.hlo_text import Computation, Instruction, Leaf, Module

# Names of what is already there, and control flow, whose parts are counted for themselves.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
         "call", "call-start", "call-done", "async-start", "async-update", "async-done",
         "after-all", "opt-barrier", "partition-id", "replica-id", "add-dependency", "iota",
         "bitcast-convert", "get-dimension-size", "rng-get-and-update-state"}
_FREE_TARGETS = ("AllocateBuffer", "ConcatBitcast", "PrepareAsync", "AsyncCollective", "Sharding",
                 "SliceScalars", "AssumeGatherIndices")
_SEE_THROUGH = ("bitcast", "copy", "reshape", "convert", "transpose")


def moved(module: Module, place: Computation, line: Instruction) -> float:
    """Bytes that `line` reads from and writes to main memory in one execution."""
    if line.op in _FREE or (line.op == "custom-call" and line.target.startswith(_FREE_TARGETS)):
        return 0.0
    operands = place.operand_leaves(line)
    read = sum(_bytes(module, leaves) for leaves in operands)
    written = _bytes(module, line.leaves)
    if line.op.endswith("-done"):
        # The start has read; a slice's start does not know how much.
        start = place.by_name.get(line.operands[0])
        sliced = start is not None and "slice" in start.op
        source = place.operand_leaves(start)[0][0] if sliced else None
        return written + (_like(module, line.leaves, source) if sliced else 0.0)
    if line.op.endswith("-start"):
        return 0.0 if "slice" in line.op else read
    if line.op in ("dynamic-slice", "slice", "gather"):
        return written + _like(module, line.leaves, operands[0][0])
    if line.op == "dynamic-update-slice":
        return _like(module, operands[1], line.leaves[0]) + _bytes(module, operands[1])
    if line.op == "scatter":
        return 3 * _bytes(module, operands[-1])
    if line.op == "custom-call":
        estimate = re.search(r'"cost_estimate":\{[^{}]*"bytes_accessed":"?(\d+)', line.attributes)
        if estimate:
            return float(estimate[1])
        return line.kernel_cost[1] if line.kernel_cost else read + written
    if line.op == "fusion":
        return _fusion(module, place, line)
    return read + written


def _bytes(module: Module, leaves: tuple[Leaf, ...]) -> float:
    return sum(leaf.bytes for leaf in leaves if _main(module, leaf))


def _main(module: Module, leaf: Leaf) -> bool:
    """Space 0 is main memory. On a GPU space 1 is too; 5 is the host's."""
    return leaf.space == 0 or (leaf.space == 1 and not module.tiled)


def _like(module: Module, leaves: tuple[Leaf, ...], where: Leaf) -> float:
    """The size of `leaves`, if the array that they are a part of lies in main memory."""
    return sum(leaf.bytes for leaf in leaves) if _main(module, where) else 0.0


def _fusion(module: Module, place: Computation, line: Instruction) -> float:
    inside = module.computations[line.called[0]]
    # A kernel that is given a part of an array by its address is wrapped in a fusion.
    kernels = [one.kernel_cost[1] for one in inside.by_name.values()
               if one.op == "custom-call" and one.kernel_cost]
    if kernels:
        return float(sum(kernels))
    total = 0.0
    for index, leaves in enumerate(place.operand_leaves(line)):
        if index in inside.parameters and leaves and _main(module, leaves[0]):
            total += min(sum(leaf.bytes for leaf in leaves),
                         _used(module, inside, inside.parameters[index].name))
    for leaf, source in zip(line.leaves, _results(inside, len(line.leaves)), strict=False):
        if _main(module, leaf):
            total += _produced(module, inside, source, leaf)
    return total


def _results(inside: Computation, count: int) -> list[Instruction]:
    root = inside.root
    if count > 1 and root.op == "tuple":
        return [inside.by_name[name] for name in root.operands]
    return [root] * count


def _used(module: Module, inside: Computation, name: str, depth: int = 0) -> float:
    """Bytes of a fusion's parameter that it reads: only slices, where only slices are used."""
    whole = sum(leaf.bytes for leaf in inside.by_name[name].leaves)
    total = 0.0
    for user, index in inside.users.get(name, ()):
        if user.op in ("dynamic-slice", "slice", "gather") and index == 0:
            total += sum(leaf.bytes for leaf in user.leaves)
        elif user.op == "dynamic-update-slice" and index == 0:
            continue  # written in place
        elif user.op == "scatter" and index == 0:
            total += sum(leaf.bytes for leaf in inside.operand_leaves(user)[-1])
        elif user.op == "tuple" and user.root:
            continue  # handed on as it is
        elif user.op == "custom-call" and user.target.startswith(_FREE_TARGETS):
            continue
        elif "chain_id=" in user.attributes:
            continue  # a collective under way; its start counts
        elif depth < 8 and (user.op in _SEE_THROUGH or _only_hands_on(module, user, index)):
            scale = whole / max(1.0, sum(leaf.bytes for leaf in user.leaves))
            total += scale * (_used(module, inside, user.name, depth + 1) if not user.root
                              else sum(leaf.bytes for leaf in user.leaves))
        elif user.op == "fusion" and user.called and depth < 8:
            inner = module.computations[user.called[0]]
            total += (_used(module, inner, inner.parameters[index].name, depth + 1)
                      if index in inner.parameters else whole)
        else:
            return whole
    return min(total, whole)


def _only_hands_on(module: Module, line: Instruction, index: int) -> bool:
    """Whether a fusion within a fusion is nothing but its operand seen in another layout."""
    if line.op != "fusion" or len(line.operands) != 1:
        return False
    inner = module.computations[line.called[0]]
    source = inner.root
    while source.op in _SEE_THROUGH and source.operands[0] in inner.by_name:
        source = inner.by_name[source.operands[0]]
    return source.op == "parameter" and int(source.literal) == index


def _produced(module: Module, inside: Computation, source: Instruction, leaf: Leaf) -> float:
    """Bytes of one result that a fusion writes: only the update, where it is made in place."""
    line, place = source, inside
    for _ in range(8):
        if line.op in _SEE_THROUGH and line.operands and line.operands[0] in place.by_name:
            line = place.by_name[line.operands[0]]
        elif line.op == "fusion" and line.called and len(line.leaves) == 1:
            place = module.computations[line.called[0]]
            line = place.root
        else:
            break
    if line.op == "parameter":
        return 0.0 if source.op == "parameter" else leaf.bytes
    if line.op == "dynamic-update-slice":
        update = place.operand_leaves(line)[1]
        return sum(part.bytes for part in update)
    if line.op == "scatter" and _given(place, line.operands[0]):
        return sum(part.bytes for part in place.operand_leaves(line)[-1])
    return leaf.bytes


def _given(inside: Computation, name: str) -> bool:
    """Whether a fusion has an array from outside, so that it may be written in place."""
    source = inside.by_name[name]
    while source.op == "bitcast":
        source = inside.by_name[source.operands[0]]
    return source.op == "parameter"
