"""Writing the published layouts: streamed shard by shard, beside the target, then renamed."""

import functools
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mmx.checkpoint import atomic
from mmx.checkpoint.hf_files import CODES, INDEX
from mmx.checkpoint.hf_import import check_host_bytes
from mmx.checkpoint.hf_names import ORIGINAL, Entry, check_layout, entries
from mmx.checkpoint.hf_source import HfSource, Region, copy_rows, cut
from mmx.checkpoint.locate import copy_tokenizer, read_json
from mmx.checkpoint.target import check_target
from mmx.config import DIALECT_NATIVE, DIALECT_ORIGINAL, ModelConfig
from mmx.errors import UserError
from mmx.quant import contracted_axes
from pallas_kernels.quantized import QuantizedTensor, TurnedTensor

DIALECTS = {ORIGINAL: DIALECT_ORIGINAL, "transformers": DIALECT_NATIVE}
DEFAULT_SHARD_BYTES = 2_200_000_000  # about the release's own


class ParamReader(Protocol):
    """Anything that hands out parts of parameters as host arrays."""

    def __call__(self, path: str, region: Region) -> np.ndarray: ...


def save_hf(directory: str | Path, config: ModelConfig, params: Mapping[str, Any],
            layout: str = ORIGINAL, dtype: str = "bfloat16",
            tokenizer_dir: str | Path | None = None,
            max_shard_bytes: int = DEFAULT_SHARD_BYTES, max_host_bytes: int = 2 << 30,
            overwrite: bool = False, progress: Callable[[int, int], None] | None = None) -> Path:
    """Writes a checkpoint of `layout` ("original" or "transformers") and returns its directory.

    Tensors are cast to `dtype`, int8 parameters multiplied out. Weights, index, config.json (in
    the layout's dialect), generation_config.json and the tokenizer files of `tokenizer_dir` are
    written beside `directory` and renamed, so that it is whole or absent. In a job of several
    processes all call it and process 0 writes. Raises UserError when the target exists, unless
    `overwrite` is to replace a checkpoint (see `check_target`).
    """
    return write_hf(directory, config, ArrayReader(params), layout=layout, dtype=dtype,
                    tokenizer_dir=tokenizer_dir, max_shard_bytes=max_shard_bytes,
                    max_host_bytes=max_host_bytes, overwrite=overwrite, progress=progress)


def write_hf(directory: str | Path, config: ModelConfig, read: ParamReader, *, layout: str,
             dtype: str, tokenizer_dir: str | Path | None, max_shard_bytes: int,
             max_host_bytes: int, overwrite: bool,
             progress: Callable[[int, int], None] | None) -> Path:
    """`save_hf` from any reader of parameters."""
    check_layout(layout)
    check_host_bytes(max_host_bytes)
    dtype = str(jnp.dtype(dtype))
    if dtype not in CODES:
        raise UserError(f"dtype={dtype} cannot be written.",
                        f"Published layouts hold {', '.join(CODES)}.", "Choose one of them.")
    directory = Path(directory).absolute()
    check_target(directory, overwrite)
    writes = jax.process_index() == 0
    beside = atomic.beside(directory)
    shards = plan_shards(entries(config, layout), np.dtype(jnp.dtype(dtype)).itemsize,
                         max_shard_bytes)
    names = shard_names(len(shards), layout)
    done, total = 0, sum(entry.size for shard in shards for entry in shard)
    try:
        if writes:
            atomic.begin(directory)
        for name, shard in zip(names, shards, strict=True):
            for count in _write_shard(beside / name if writes else None, shard, read, dtype,
                                      max_host_bytes):
                done += count
                if progress is not None:
                    progress(done, total)
        if writes:
            _write_texts(beside, config, layout, dtype, shards, names, tokenizer_dir)
            atomic.swap(directory)
    except OSError as error:
        raise UserError(f"{directory} cannot be written ({error.strerror or error}).",
                        "The folder above it must be writable and have room for the weights.",
                        "Choose another place.") from error
    finally:
        if writes:
            shutil.rmtree(beside, ignore_errors=True)
    atomic.barrier(f"written {directory}")
    return directory


def plan_shards(tensors: Iterable[Entry], itemsize: int, max_bytes: int) -> list[list[Entry]]:
    """Fills shards in order up to `max_bytes`; a larger tensor has its own."""
    shards: list[list[Entry]] = []
    room = 0
    for entry in tensors:
        size = entry.size * itemsize
        if not shards or size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(entry)
        room -= size
    return shards


def shard_names(count: int, layout: str) -> list[str]:
    """File names; the release numbers its shards from zero, transformers from one."""
    if count == 1:
        return ["model.safetensors"]
    first = 0 if layout == ORIGINAL else 1
    return [f"model-{first + i:05d}-of-{count:05d}.safetensors" for i in range(count)]


def header_bytes(shard: Iterable[Entry], dtype: str) -> bytes:
    """The safetensors header of a shard: length, JSON padded with spaces to eight bytes."""
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset, itemsize = 0, np.dtype(jnp.dtype(dtype)).itemsize
    for entry in shard:
        end = offset + entry.size * itemsize
        content[entry.name] = {"dtype": CODES[dtype], "shape": list(entry.shape),
                               "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_shard(path: Path | None, shard, read: ParamReader, dtype: str, max_host_bytes: int):
    """Writes one file block by block; yields the elements of each. Reads all the same without."""
    # A block exists as stored, as float32, and in the file's order and dtype.
    room = max_host_bytes // 16
    out_dtype = np.dtype(jnp.dtype(dtype))
    file = open(path, "wb") if path is not None else None
    try:
        if file is not None:
            file.write(header_bytes(shard, dtype))
        for entry in shard:
            whole = [slice(0, n) for n in entry.view]
            for view in cut(whole, room, len(whole)):
                spans = dict(zip(entry.axes, view, strict=True))
                spans |= {axis: slice(i, i + 1) for axis, i in entry.at.items()}
                block = read(entry.path, tuple(spans[axis] for axis in entry.param_axes))
                if file is not None:
                    file.write(_in_file_order(entry, block, out_dtype))
                yield block.size
        if file is not None:
            file.flush()
            os.fsync(file.fileno())
    finally:
        if file is not None:
            file.close()


def _in_file_order(entry: Entry, block: np.ndarray, dtype) -> memoryview:
    order = [axis for axis in entry.param_axes if axis in entry.axes]
    block = block.reshape([n for n, axis in zip(block.shape, entry.param_axes, strict=True)
                           if axis in entry.axes])
    source = block.transpose([order.index(axis) for axis in entry.axes])
    out = np.empty(source.shape, dtype)
    if source.flags.c_contiguous:
        out[...] = source
    else:
        # Seen from the source, so that the copy walks blocks of both sides.
        copy_rows(out.transpose(np.argsort([order.index(axis) for axis in entry.axes])), block)
    return out.reshape(-1).view(np.uint8).data


class ArrayReader:
    """Reads parts of parameters from device arrays, multiplying int8 ones out."""

    def __init__(self, params: Mapping[str, Any]):
        self._params = params
        self._views: dict[int, np.ndarray] = {}

    def __call__(self, path: str, region: Region) -> np.ndarray:
        value, axes = self._params[path], contracted_axes(path)
        if isinstance(value, TurnedTensor):
            return self._turned_part(value, region, axes[0])
        if not isinstance(value, QuantizedTensor):
            return self._part(value, region)
        scale = tuple(slice(0, 1) if i in axes else part for i, part in enumerate(region))
        return self._part(value.values, region).astype(np.float32) * self._part(value.scale, scale)

    def _turned_part(self, leaf: TurnedTensor, region: Region, first: int) -> np.ndarray:
        """As the product of a plain leaf; its contracted axes begin at `first`."""
        behind = first + len(leaf.inner)
        lead, inner, outer = region[:first], region[first:behind], region[behind:]
        held = (*leaf.values.shape[:first], *leaf.outer)
        values = self._part(leaf.values, (*lead, *outer, *inner), (*held, *leaf.inner))
        scale = self._part(leaf.scale, (*lead, *outer), held)
        whole = values.astype(np.float32) * scale.reshape(*scale.shape, *[1] * len(inner))
        return whole.transpose(*range(first), *range(first + len(outer), whole.ndim),
                               *range(first, first + len(outer)))

    def _part(self, array, region: Region, shape: tuple[int, ...] = ()) -> np.ndarray:
        """A part by the axes of `shape`, the array's own if empty."""
        shape = shape or array.shape
        if not isinstance(array, jax.Array):
            return np.asarray(array).reshape(shape)[region]
        if len(array.sharding.device_set) == 1 and array.is_fully_addressable and all(
                device.platform == "cpu" for device in array.sharding.device_set):
            # A view; device memory is host memory.
            return np.asarray(array).reshape(shape)[region]
        starts = np.asarray([part.start for part in region], np.int32)
        part = _slice(array, starts, tuple(part.stop - part.start for part in region), shape)
        if part.is_fully_addressable:
            return np.asarray(part)
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(part, tiled=True))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _slice(array, starts, sizes, shape):
    return jax.lax.dynamic_slice(
        array.reshape(shape), [starts[i] for i in range(len(shape))], sizes)


class SourceReader:
    """Reads parts of parameters from another checkpoint, without ever loading it."""

    def __init__(self, source: HfSource, dtype: str):
        self._source, self._dtype = source, np.dtype(jnp.dtype(dtype))

    def __call__(self, path: str, region: Region) -> np.ndarray:
        out = np.empty([part.stop - part.start for part in region], self._dtype)
        for piece in self._source.pieces(path, region, 1 << 62, self._dtype.itemsize):
            values, _ = self._source.load(piece, self._dtype)
            out[tuple(slice(part.start - whole.start, part.stop - whole.start)
                      for part, whole in zip(piece.region, region, strict=True))] = values
        return out


def _write_texts(beside: Path, config: ModelConfig, layout, dtype, shards, names, tokenizer_dir):
    itemsize = np.dtype(jnp.dtype(dtype)).itemsize
    if len(shards) > 1:
        weight_map = {entry.name: name for name, shard in zip(names, shards, strict=True)
                      for entry in shard}
        total = sum(entry.size for shard in shards for entry in shard) * itemsize
        atomic.write_json(beside / INDEX, {"metadata": {"total_size": total},
                                           "weight_map": dict(sorted(weight_map.items()))})
    hf = config.to_hf(DIALECTS[layout]) | {"torch_dtype": dtype}
    atomic.write_json(beside / "config.json", hf)
    generation = {}
    if tokenizer_dir is not None:
        source = Path(tokenizer_dir)
        if (source / "generation_config.json").exists():
            generation = read_json(source / "generation_config.json")
        copy_tokenizer(source, beside)
    if config.eos_token_ids:
        ids = list(config.eos_token_ids)
        generation["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    atomic.write_json(beside / "generation_config.json", generation)
