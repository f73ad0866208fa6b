"""A checkpoint directory as a source of parameters: checked whole, then read piece by piece."""

import dataclasses
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mmx.checkpoint.hf_files import DTYPES, Reader, TensorRef, scan
from mmx.checkpoint.hf_names import Entry, match
from mmx.config import ModelConfig
from mmx.errors import UserError
from mmx.quant import quantize_rows

log = logging.getLogger(__name__)
_LISTED = 20  # names per kind of problem in the error; the rest is counted
_ROWS = 64  # rows converted at a time, so that they stay in a core's cache

Region = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A block of one tensor: `view` in the axes of the file, `region` in the parameter's."""

    ref: TensorRef
    entry: Entry
    view: Region
    region: Region

    @property
    def size(self) -> int:
        return math.prod(part.stop - part.start for part in self.view)


class HfSource:
    """The weights of `config` in a directory of either published layout.

    Construction reads only headers and raises one UserError that lists every missing, unknown,
    mis-shaped, wrongly typed or doubled tensor and every truncated or unreadable file.
    """

    def __init__(self, config: ModelConfig, directory: Path):
        self.config, self.directory, self.reader = config, Path(directory), Reader()
        self.tensors: dict[str, list[tuple[TensorRef, Entry]]] = {}
        found = check(config, self.directory)
        if found.problems:
            raise UserError(
                f"The checkpoint in {directory} does not fit its config.json.\n"
                + "\n".join(f"  {line}" for line in summary(found.problems)),
                "\nEvery tensor of the model is read once, and nothing else may be present.",
                "Fetch the files named above again, or correct config.json.")
        for line in found.notes:
            log.info("%s: %s", directory, line)
        for ref, entry in found.tensors:
            self.tensors.setdefault(entry.path, []).append((ref, entry))

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.reader.__exit__(*exc)

    @property
    def dtype(self) -> str:
        """Name of the dtype that holds most of the bytes."""
        totals: dict[str, int] = {}
        for refs in self.tensors.values():
            for ref, _ in refs:
                name = DTYPES[ref.dtype].name
                totals[name] = totals.get(name, 0) + ref.nbytes
        return max(totals, key=totals.get)

    def pieces(self, path: str, region: Region, max_bytes: int, out_itemsize: int
               ) -> Iterator[Piece]:
        """Cuts `region` of a parameter into pieces whose file and output bytes fit `max_bytes`.

        Contracted axes are never cut, so that a piece can be quantised by itself.
        """
        for ref, entry in self.tensors[path]:
            place = {axis: part for axis, part in zip(entry.param_axes, region, strict=True)}
            if not all(place[axis].start <= i < place[axis].stop for axis, i in entry.at.items()):
                continue
            whole = tuple(place[axis] for axis in entry.axes)
            fixed = len(entry.contracted) if entry.contracted else 0
            room = max_bytes // (DTYPES[ref.dtype].itemsize + out_itemsize)
            for view in cut(whole, room, len(whole) - fixed):
                spans = dict(zip(entry.axes, view, strict=True))
                spans |= {axis: slice(i, i + 1) for axis, i in entry.at.items()}
                yield Piece(ref, entry, view, tuple(spans[axis] for axis in entry.param_axes))

    def load(self, piece: Piece, dtype, quantize: bool = False, order: Sequence[int] = ()
             ) -> tuple[np.ndarray, np.ndarray | None]:
        """Reads a piece in the parameter's axes: (values of `dtype`, None) or (int8, scales).

        order: in which the axes lie in the values' memory; their own if empty.
        """
        entry = piece.entry
        source = self.reader.read(piece.ref, entry.view, piece.view)
        values, in_file = _like_param(piece, np.int8 if quantize else dtype, order=order)
        if not quantize:
            copy_rows(in_file, source)
            return values, None
        lead = source.ndim - len(entry.contracted)
        scale, scale_in_file = _like_param(piece, np.float32, entry.contracted)
        rows = source.shape[lead - 1]
        for index in np.ndindex(source.shape[:lead - 1]):
            for i in range(0, rows, _ROWS):
                part = source[index][i:i + _ROWS]
                q, s = quantize_rows(part.reshape(part.shape[0], -1))
                in_file[index][i:i + _ROWS] = q.reshape(part.shape)
                scale_in_file[index][i:i + _ROWS] = s.reshape(-1, *[1] * (part.ndim - 1))
        if not np.isfinite(scale).all():
            raise UserError(f"{entry.name} in {piece.ref.file} holds values that are not finite.",
                            "Weights must be finite to be quantised.", "Fetch the file again.")
        return values, scale


def _like_param(piece: Piece, dtype, single: str = "", order: Sequence[int] = ()
                ) -> tuple[np.ndarray, np.ndarray]:
    """A new array shaped as the piece in the parameter, and the same memory in the file's axes.

    Axes in `single` have size 1; `order` is the one in which they lie in memory.
    """
    entry = piece.entry
    shape = [1 if axis in single else part.stop - part.start
             for axis, part in zip(entry.param_axes, piece.region, strict=True)]
    order = list(order) or list(range(len(shape)))
    array = np.empty([shape[i] for i in order], dtype).transpose(np.argsort(order))
    spanned = array.reshape([n for n, a in zip(shape, entry.param_axes, strict=True)
                             if a in entry.axes])
    held = [a for a in entry.param_axes if a in entry.axes]
    return array, spanned.transpose([held.index(a) for a in entry.axes])


def copy_rows(out: np.ndarray, source: np.ndarray):
    """`out[...] = source` with casting, in blocks that make a transposed copy cache-friendly."""
    if source.ndim < 2 or out.flags.c_contiguous:
        out[...] = source
        return
    for index in np.ndindex(source.shape[:-2]):
        for i in range(0, source.shape[-2], _ROWS):
            out[index][i:i + _ROWS] = source[index][i:i + _ROWS]


def cut(region: Sequence[slice], room: int, axes: int) -> Iterator[Region]:
    """Cuts a region along its first `axes` axes into blocks of at most `room` elements.

    Blocks come in row-major order, so in a file they follow one another. A block of one index on
    all those axes is not cut further, whatever its size.
    """
    region = tuple(region)
    for axis in range(axes):
        unit = math.prod(part.stop - part.start for part in region[axis + 1:])
        part = region[axis]
        if (part.stop - part.start) * unit <= room:
            break
        if unit <= room or axis == axes - 1:
            step = max(1, room // unit)
            for i in range(part.start, part.stop, step):
                chosen = slice(i, min(i + step, part.stop))
                yield (*region[:axis], chosen, *region[axis + 1:])
            return
        for i in range(part.start, part.stop):
            for rest in cut(region[axis + 1:], room, axes - axis - 1):
                yield (*region[:axis], slice(i, i + 1), *rest)
        return
    yield region


@dataclasses.dataclass
class Checked:
    """Tensors to read, problems by kind, notes on what is ignored, and all headers."""

    tensors: list[tuple[TensorRef, Entry]]
    problems: dict[str, list[str]]
    notes: list[str]
    files: dict[str, TensorRef]


def check(config: ModelConfig, directory: Path) -> Checked:
    """Compares every header in `directory` with what `config` needs, reading no weights."""
    files = scan(directory)
    names = match(config, files.tensors)
    shapes, dtypes, tensors = [], [], []
    for name, entry in names.found:
        ref = files.tensors[name]
        if ref.shape != entry.shape:
            shapes.append(f"{name}: {list(ref.shape)} in the file, {list(entry.shape)} by the "
                          "config")
        if ref.dtype not in DTYPES:
            dtypes.append(f"{name}: {ref.dtype}, not one of {', '.join(DTYPES)}")
        tensors.append((ref, entry))
    problems = {
        "file": files.problems, "missing": names.missing, "unknown": names.unknown,
        "wrong shape": shapes, "wrong dtype": dtypes,
        "twice": [f"{a} and {b}" for a, b in names.doubled],
    }
    notes = []
    if names.ignored:
        notes.append(f"ignoring {len(names.ignored)} decay and rotary tables, recomputed in "
                     "float32")
    if names.vision:
        notes.append(f"ignoring {len(names.vision)} tensors of the vision tower")
    return Checked(tensors, {kind: lines for kind, lines in problems.items() if lines}, notes,
                   files.tensors)


def summary(problems: dict[str, list[str]]) -> list[str]:
    """One line per problem, at most 20 of a kind and then their count."""
    lines = []
    for kind, items in problems.items():
        lines += [f"{kind}: {item}" for item in items[:_LISTED]]
        if len(items) > _LISTED:
            lines.append(f"{kind}: … and {len(items) - _LISTED} more")
    return lines
