"""Reads the text of a compiled program (optimised HLO) into computations and loop counts."""

import dataclasses
import functools
import math
import re

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "s1": 1, "u1": 1, "f4e2m1fn": 4,
         "bf16": 16, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"\b(pred|token|opaque|bf16|f4e2m1fn|f8\w+|[suf]\d+|c\d+)"
                    r"\[([\d,<=?]*)\](?:\{([^{}]*)\})?|\b(token)\b")
_COMPUTATION = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s*\(.*\{\s*$")
# What a kernel says of itself stands on lines of its own, the last of which begins with a brace.
_KERNEL_COST = re.compile(r"kernel_cost_flops_(\d+)_bytes_(\d+)")
_KERNEL_NOTES = re.compile(r"kernel_metadata=\{\n[^\n]*\n\}")
# The name of `mmx.parallel.exchange.FURTHER`, spelled out: this file is read without jax.
RARE = "further_rounds"
_INSTRUCTION = re.compile(r"^\s+(ROOT\s+)?%?([\w.\-]+)\s*=\s*(.*)$")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array: its element type, its size, and the memory space that its layout names."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def bytes(self) -> float:
        if self.dtype in _BITS:
            bits = _BITS[self.dtype]
        else:
            bits = 8 if self.dtype.startswith("f8") else int(re.sub(r"\D", "", self.dtype))
        return math.prod(self.dims) * bits / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `attributes` is what follows the operands, metadata left out."""

    name: str
    op: str
    leaves: tuple[Leaf, ...]
    operands: tuple[str, ...]
    literal: str             # the text between the parentheses
    attributes: str
    root: bool
    source: str = ""         # the operation of the traced program that it stems from

    def attribute(self, pattern: str) -> str | None:
        match = re.search(pattern, self.attributes)
        return match[1] if match else None

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """The computations that this line runs as they stand; not a reduction's scalar one."""
        if self.op == "conditional":
            branches = self.attribute(r"branch_computations=\{([^}]*)\}")
            names = branches.split(",") if branches else [
                self.attribute(r"true_computation=%?([\w.\-]+)"),
                self.attribute(r"false_computation=%?([\w.\-]+)")]
            return tuple(name.strip().lstrip("%") for name in names if name)
        pattern = {"fusion": r"calls=%?([\w.\-]+)", "call": r"to_apply=%?([\w.\-]+)",
                   "call-start": r"(?:to_apply|calls)=%?([\w.\-]+)",
                   "async-start": r"(?:calls|to_apply)=%?([\w.\-]+)",
                   "while": r"body=%?([\w.\-]+)"}.get(self.op)
        name = self.attribute(pattern) if pattern else None
        return (name,) if name else ()

    @property
    def target(self) -> str:
        return self.attribute(r'custom_call_target="([^"]*)"') or ""

    @property
    def kernel_cost(self) -> tuple[float, float] | None:
        """(operations, bytes) as `pallas_kernels.costs` tells them in the name of a kernel."""
        found = _KERNEL_COST.findall(self.source)
        return (float(found[-1][0]), float(found[-1][1])) if found else None


class Computation:
    """Instructions in order and by name."""

    def __init__(self, name: str):
        self.name = name
        self.lines: list[Instruction] = []
        self.by_name: dict[str, Instruction] = {}

    def add(self, line: Instruction) -> None:
        self.lines.append(line)
        self.by_name[line.name] = line

    @functools.cached_property
    def root(self) -> Instruction:
        return next((line for line in self.lines if line.root), self.lines[-1])

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(line.literal): line for line in self.lines if line.op == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[tuple[Instruction, int]]]:
        """Name -> the lines that read it and at which operand."""
        found: dict[str, list[tuple[Instruction, int]]] = {}
        for line in self.lines:
            for index, operand in enumerate(line.operands):
                found.setdefault(operand, []).append((line, index))
        return found

    def operand_leaves(self, line: Instruction) -> list[tuple[Leaf, ...]]:
        return [self.by_name[name].leaves for name in line.operands if name in self.by_name]


@dataclasses.dataclass
class Module:
    """A program; `tiled` says that its layouts are a TPU's."""

    computations: dict[str, Computation]
    entry: str
    tiled: bool


@functools.lru_cache(maxsize=2)
def parse(text: str) -> Module:
    """Reads `compiled.as_text()`. Raises ValueError where it holds no entry computation."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in _KERNEL_NOTES.sub("kernel_metadata={}", text).splitlines():
        if current is None:
            if match := _COMPUTATION.match(line):
                current = Computation(match[2])
                computations[match[2]] = current
                entry = match[2] if match[1] else entry
        elif line.startswith("}"):
            current = None
        elif match := _INSTRUCTION.match(line):
            current.add(_instruction(match[2], match[3], bool(match[1])))
    if not entry:
        raise ValueError("The text holds no ENTRY computation of an HLO program.")
    return Module(computations, entry, ":T(" in text)


def _instruction(name: str, rest: str, root: bool) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else _blank(rest)
    shape, rest = rest[:end], rest[end:].lstrip()
    start = rest.find("(")
    close = _closing(rest, start)
    literal = rest[start + 1:close]
    # A constant's value may hold anything; names of operands stand after a percent sign.
    operands = () if rest.startswith("constant(") else tuple(
        re.findall(r"%([\w.\-]+)", literal) or _bare(literal))
    attributes, source = rest[close + 1:], re.search(r'op_name="([^"]*)"', rest[close + 1:])
    attributes = re.sub(r"metadata=\{[^}]*\}", "", attributes)
    return Instruction(name, rest[:start], leaves_of(shape), operands, literal, attributes, root,
                       source[1] if source else "")


def numbers(text: str) -> list[int]:
    """All whole numbers in a text."""
    return [int(number) for number in re.findall(r"\d+", text)]


def _bare(literal: str) -> list[str]:
    """Operands of text printed without percent signs."""
    return [part.split()[-1] for part in re.split(r",\s*(?![^\[{(]*[\]})])", literal)
            if part.strip() and re.fullmatch(r"[A-Za-z_][\w.\-]*", part.split()[-1])]


def leaves_of(shape: str) -> tuple[Leaf, ...]:
    """Arrays of a shape's text, those of a tuple in order."""
    found = []
    for dtype, dims, layout, token in _SHAPE.findall(shape):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(re.sub(r"\D", "", size)) for size in dims.split(",") if size)
        found.append(Leaf(dtype or token, sizes, int(space[1]) if space else 0))
    return tuple(found)


def _closing(text: str, start: int) -> int:
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] in "([{") - (text[index] in ")]}")
        if depth == 0:
            return index
    return len(text)


def _blank(text: str) -> int:
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == " " and depth == 0:
            return index
    return len(text)


def trip_count(module: Module, place: Computation, loop: Instruction) -> int | None:
    """How often a while loop's body runs; None where the text does not say.

    From `known_trip_count` of its backend's notes, else from a condition that compares a counter
    with a constant: its first value from the operand, its step from the body.
    """
    if known := loop.attribute(r'known_trip_count"?\s*[:=]\s*\{"?n"?\s*[:=]\s*"?(\d+)'):
        return int(known)
    condition = module.computations[loop.attribute(r"condition=%?([\w.\-]+)")]
    body = module.computations[loop.called[0]]
    first = place.by_name.get(loop.operands[0])

    def start(index: int) -> int | None:
        if first is None or first.op != "tuple":
            return None
        return _constant(place, first.operands[index])

    compare, sides = condition.root, []
    names = list(compare.operands)
    if compare.op == "fusion":
        inner = module.computations[compare.called[0]]
        compare = inner.root
        names = [condition.root.operands[int(inner.by_name[name].literal)]
                 if inner.by_name[name].op == "parameter" else name for name in compare.operands]
        constants = {name: _constant(inner, name) for name in compare.operands}
    else:
        constants = {}
    if compare.op != "compare":
        return None
    for name in names:
        value = constants.get(name)
        sides.append(value if value is not None else _constant(condition, name))
    indices = [_index(condition, name) for name in names]
    counter = next((i for i in (0, 1) if sides[i] is None and indices[i] is not None and
                    _step(body, indices[i])), None)
    if counter is None:
        return None
    limit = sides[1 - counter]
    if limit is None and indices[1 - counter] is not None:
        limit = start(indices[1 - counter])
    begin, step = start(indices[counter]), _step(body, indices[counter])
    begin = 0 if begin is None else begin
    if limit is None:
        return None
    direction = compare.attribute(r"direction=(\w+)")
    distance = limit - begin
    if direction in ("LE", "GE"):
        distance += 1 if step > 0 else -1
    return max(0, math.ceil(distance / step))


def trips(module: Module, place: Computation, loop: Instruction) -> int:
    """`trip_count`, and where the data decide it the most that it can sensibly be.

    That is as many pieces as fit into the longest side that its body cuts into pieces (all blocks
    of a cache, say), and 1 where it cuts none. What is traced under the name `RARE` counts as not
    running.
    """
    if RARE in loop.source:
        return 0
    known = trip_count(module, place, loop)
    if known is not None:
        return known
    return max(_pieces(module, module.computations[loop.called[0]]), default=1)


def _pieces(module: Module, place: Computation) -> list[int]:
    found = []
    for line in place.lines:
        if line.op == "dynamic-slice":
            whole = place.operand_leaves(line)[0][0].dims
            found += [size // max(1, piece)
                      for size, piece in zip(whole, line.leaves[0].dims, strict=True)]
        elif line.op == "fusion":
            found += _pieces(module, module.computations[line.called[0]])
    return found


def _constant(place: Computation, name: str) -> int | None:
    line = place.by_name.get(name)
    while line is not None and line.op in ("copy", "bitcast", "convert", "reshape"):
        line = place.by_name.get(line.operands[0])
    if line is None or line.op != "constant":
        return None
    return int(line.literal) if re.fullmatch(r"-?\d+", line.literal) else None


def _index(place: Computation, name: str) -> int | None:
    """The element of the loop's tuple that a line is."""
    line = place.by_name.get(name)
    while line is not None and line.op in ("copy", "bitcast"):
        line = place.by_name.get(line.operands[0])
    if line is None or line.op != "get-tuple-element":
        return None
    return int(line.attribute(r"index=(\d+)"))


def _step(body: Computation, index: int) -> int | None:
    """What the body adds to an element of its tuple: 1 where it is computed out of sight."""
    if body.root.op != "tuple" or index >= len(body.root.operands):
        return None
    line = body.by_name.get(body.root.operands[index])
    while line is not None and line.op in ("copy", "bitcast"):
        line = body.by_name.get(line.operands[0])
    if line is None or line.op in ("get-tuple-element", "constant", "parameter"):
        return None
    if line.op in ("add", "subtract"):
        steps = [_constant(body, name) for name in line.operands]
        value = next((step for step in steps if step is not None), 1)
        return -value if line.op == "subtract" else value
    return 1
