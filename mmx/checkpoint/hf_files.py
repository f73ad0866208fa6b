"""Reading safetensors by byte range: headers, shards, slices of tensors."""

import dataclasses
import itertools
import json
import math
import os
import struct
import threading
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from mmx.errors import UserError

INDEX = "model.safetensors.index.json"
DTYPES = {"BF16": np.dtype(jnp.bfloat16), "F16": np.dtype(np.float16),
          "F32": np.dtype(np.float32)}
CODES = {dtype.name: code for code, dtype in DTYPES.items()}
_MAX_HEADER = 100 << 20  # the format's own limit
# Disks serve whole pages, so a hole of at most one is read through.
_PAGE = 4096
_SPAN = 1 << 20  # bytes at once when reading through holes


@dataclasses.dataclass(frozen=True)
class TensorRef:
    """Where a tensor's bytes lie: file, absolute offset and length; dtype as the header has it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class BadHeader(Exception):
    """A safetensors file whose header is not usable."""


def read_header(path: Path) -> dict[str, TensorRef]:
    """Returns the tensors that `path` promises; raises BadHeader when it cannot be parsed."""
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER + 1
        text = file.read(length) if length <= _MAX_HEADER else b""
    if length > _MAX_HEADER or len(text) < length:
        raise BadHeader("it ends within its header, or is not a safetensors file")
    try:
        content = json.loads(text)
        refs = {}
        for name, entry in content.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            shape = tuple(int(n) for n in entry["shape"])
            dtype = DTYPES.get(entry["dtype"])
            fits = dtype is None or end - begin == math.prod(shape) * dtype.itemsize
            if min(begin, end - begin, *shape, 0) < 0 or not fits:
                raise ValueError(name)
            refs[name] = TensorRef(path, str(entry["dtype"]), shape, 8 + length + begin,
                                   end - begin)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadHeader("its header is not valid JSON of the safetensors form") from error
    return refs


@dataclasses.dataclass
class Scan:
    """The tensors of a checkpoint directory, and what is wrong with its files, as sentences."""

    tensors: dict[str, TensorRef]
    problems: list[str]


def scan(directory: Path) -> Scan:
    """Reads the headers of every weight file of `directory` (index, single file or loose shards).

    Raises UserError when there is no weight file at all or the index is not readable.
    """
    index = directory / INDEX
    if index.exists():
        wanted = _read_index(index)
        files = sorted(set(wanted.values()))
    else:
        wanted = None
        files = sorted(path.name for path in directory.glob("*.safetensors"))
        if not files:
            raise UserError(f"{directory} holds no weights.",
                            f"A checkpoint has {INDEX}, model.safetensors or other .safetensors "
                            "files.", "Check the path, or finish the download.")
    result = Scan({}, [])
    broken = set()
    for name in files:
        path = directory / name
        try:
            refs = read_header(path)
            size = path.stat().st_size
        except FileNotFoundError:
            result.problems.append(f"{name}: the file is missing, and {INDEX} names it")
        except OSError as error:
            result.problems.append(f"{name}: it cannot be read ({error.strerror})")
        except BadHeader as error:
            result.problems.append(f"{name}: {error}")
        else:
            end = max((ref.offset + ref.nbytes for ref in refs.values()), default=0)
            if end > size:
                result.problems.append(
                    f"{name}: truncated, its header promises {end} bytes and it has {size}")
            for key, ref in refs.items():
                if wanted is not None and wanted.get(key) != name:
                    continue
                if key in result.tensors:
                    result.problems.append(
                        f"{key}: in both {result.tensors[key].file.name} and {name}")
                result.tensors[key] = ref
            continue
        broken.add(name)
    for key, name in (wanted or {}).items():
        if key not in result.tensors and name not in broken:
            result.problems.append(f"{key}: {INDEX} places it in {name}, which does not have it")
    return result


def _read_index(index: Path) -> dict[str, str]:
    try:
        wanted = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(wanted, dict) or not all(isinstance(v, str) for v in wanted.values()):
            raise ValueError("weight_map")
        # A name that leaves the directory is a mistake or an attack.
        if any(Path(v).name != v for v in wanted.values()):
            raise ValueError("weight_map")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} is not readable.",
                        "It is JSON with a 'weight_map' from tensor name to file name in the same "
                        "directory.", "Fetch it again, or remove it so that all .safetensors files "
                        "are read.") from error
    return wanted


class Reader:
    """Reads slices of tensors by positional reads; counts what it read; safe between threads."""

    def __init__(self):
        self.bytes_read = 0
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def read(self, ref: TensorRef, view: Sequence[int], region: Sequence[slice]) -> np.ndarray:
        """Returns `region` of the tensor seen with shape `view`, reading only its bytes.

        `region` has one slice with explicit bounds and step 1 per axis of `view`.
        """
        dtype = DTYPES[ref.dtype]
        shape = [part.stop - part.start for part in region]
        # Axes after the last partial one are contiguous in the file.
        last = max((i for i, part in enumerate(region) if shape[i] != view[i]), default=-1)
        tail = math.prod(view[last + 1:])
        out = np.empty(shape, dtype)
        if last < 0:
            self._fill(ref, 0, out.reshape(-1))
            return out
        run = shape[last] * tail
        stride = view[last] * tail
        start = region[last].start * tail
        if last > 0 and 0 < (stride - run) * dtype.itemsize <= _PAGE:
            self._read_through(ref, view, region, last - 1, start, run, stride, out)
            return out
        flat = out.reshape(-1, run)
        for i, offset in enumerate(self._offsets(view, region, last)):
            self._fill(ref, offset * stride + start, flat[i])
        return out

    def _read_through(self, ref, view, region, axis, start, run, stride, out):
        """Reads runs that lie closer than a page along `axis`, with the holes between them."""
        first, rows = region[axis].start, region[axis].stop - region[axis].start
        step = max(1, _SPAN // (stride * out.itemsize))
        flat = out.reshape(-1, rows, run)
        for i, offset in enumerate(self._offsets(view, region, axis)):
            for row in range(0, rows, step):
                count = min(step, rows - row)
                span = np.empty((count - 1) * stride + run, out.dtype)
                self._fill(ref, (offset * view[axis] + first + row) * stride + start, span)
                flat[i, row:row + count] = np.lib.stride_tricks.as_strided(
                    span, (count, run), (stride * out.itemsize, out.itemsize))

    @staticmethod
    def _offsets(view, region, axis):
        """Flat index of each selected position over the axes before `axis`, in order."""
        strides = [math.prod(view[i + 1:axis]) for i in range(axis)]
        for index in itertools.product(*(range(p.start, p.stop) for p in region[:axis])):
            yield sum(i * s for i, s in zip(index, strides, strict=True))

    def _fill(self, ref: TensorRef, start: int, out: np.ndarray):
        """Fills the flat array `out` from element `start` of the tensor."""
        buffer = out.view(np.uint8).data
        offset, done = ref.offset + start * out.itemsize, 0
        while done < len(buffer):
            count = os.preadv(self._descriptor(ref.file), [buffer[done:]], offset + done)
            if count <= 0:
                raise UserError(f"{ref.file} ended while it was read.",
                                "It must not change during loading.", "Fetch the file again.")
            done += count
        with self._lock:
            self.bytes_read += len(buffer)

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._files:
                self._files[path] = os.open(path, os.O_RDONLY)
            return self._files[path]
