"""Loading published weights onto devices: streamed, sharded, with bounded host memory."""

import collections
import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from mmx.checkpoint.hf_source import HfSource, Piece, Region
from mmx.errors import UserError
from mmx.model import param_specs
from mmx.quant import check_mode, contracted_axes, turned_sharding, turns
from pallas_kernels.quantized import QuantizedTensor

MIN_HOST_BYTES = 16 << 20
Progress = Callable[[int, int], None]


def check_host_bytes(max_host_bytes: int):
    if max_host_bytes < MIN_HOST_BYTES:
        raise UserError(f"max_host_bytes={max_host_bytes} is too small.",
                        f"Tensors are read in pieces, which need {MIN_HOST_BYTES} bytes together.",
                        "Give at least 16 MiB; 2 GiB is the default.")


def import_params(source: HfSource, *, dtype, quantize: str | None = None,
                  shardings: Mapping[str, Any] | None = None, max_host_bytes: int = 2 << 30,
                  progress: Progress | None = None, turned: bool | None = None) -> dict:
    """Reads all parameters of `source` onto this process's devices.

    Reads only the bytes that the addressable shards need; a shard that splits an axis over which
    int8 scales are taken needs the whole of that axis. `max_host_bytes` bounds what is held on the
    host besides the result. `shardings` maps paths to shardings (a path that it lacks goes to the
    default device); for a quantised parameter it may hold a QuantizedTensor of two. int8 matrices
    that `mmx.quant.turns` names are written turned from the start: nothing is held both ways.
    `progress(done, total)` counts elements of this process.
    """
    check_mode(quantize)
    check_host_bytes(max_host_bytes)
    workers = max(1, min(8, os.cpu_count() or 1, max_host_bytes // MIN_HOST_BYTES))
    # Each worker holds a piece and its converted copy, as much waits, and two copies are being
    # written; the rest is slack for the allocator.
    unit = max_host_bytes // (4 * (workers + 1))
    jobs = []
    for path, spec in param_specs(source.config, dtype).items():
        jobs += _jobs(path, spec, quantize, (shardings or {}).get(path), turned, unit)
    arrays: dict[str, dict[str, list[jax.Array]]] = {}
    done, total = 0, sum(job.size for job in jobs)
    waiting: collections.deque = collections.deque()

    def finish():
        nonlocal done
        job, piece, is_last, future = waiting.popleft()
        job.write(piece, *future.result())
        done += piece.size
        if is_last:
            for part, shards in job.finish().items():
                arrays.setdefault(job.path, {}).setdefault(part, []).extend(shards)
        if progress is not None:
            progress(done, total)

    with ThreadPoolExecutor(workers) as pool:
        for job in jobs:
            for piece, is_last in _mark_last(job.pieces(source)):
                if len(waiting) > workers:
                    finish()
                future = pool.submit(source.load, piece, job.dtype, job.is_quantized, job.order)
                waiting.append((job, piece, is_last, future))
        while waiting:
            finish()
    return {path: _assemble(jobs_of, arrays[path])
            for path, jobs_of in _by_path(jobs).items()}


def _mark_last(items: Iterator[Piece]) -> Iterator[tuple[Piece, bool]]:
    previous = None
    for item in items:
        if previous is not None:
            yield previous, False
        previous = item
    if previous is not None:
        yield previous, True


def _by_path(jobs):
    result = {}
    for job in jobs:
        result.setdefault(job.path, []).append(job)
    return result


def _assemble(jobs: list["_Job"], parts: dict[str, list[jax.Array]]):
    job, make = jobs[0], jax.make_array_from_single_device_arrays
    if job.order:
        places = turned_sharding(job.sharding, job.shape, job.axes)
        shape = job.flat(job.shape)
        return dataclasses.replace(places, values=make(shape, places.values, parts["values"]),
                                   scale=make(shape[:-1], places.scale, parts["scale"]))
    values = make(job.shape, job.sharding, parts["values"])
    if not job.is_quantized:
        return values
    return QuantizedTensor(values, make(job.scale_shape, job.scale_sharding, parts["scale"]))


def _jobs(path, spec, quantize, sharding, turned, unit) -> list["_Job"]:
    """One job per distinct region that this process has to read for a parameter."""
    axes = contracted_axes(path) if quantize else ()
    if sharding is None:
        device = jax.config.jax_default_device or jax.local_devices()[0]
        if isinstance(device, str):
            device = jax.local_devices(backend=device)[0]
        sharding = SingleDeviceSharding(device)
    if isinstance(sharding, QuantizedTensor):
        sharding, scale_sharding = sharding.values, sharding.scale
        if not axes:
            scale_sharding = None
    else:
        scale_sharding = scale_sharding_of(sharding, spec.shape, axes) if axes else None
    order = ()
    if axes and turns(spec, sharding, turned):
        order = (*range(axes[0]), *range(axes[-1] + 1, len(spec.shape)), *axes)
    readings: dict[tuple, dict[tuple, list]] = {}
    for device, index in sharding.addressable_devices_indices_map(spec.shape).items():
        own = tuple(part.indices(n)[:2] for part, n in zip(index, spec.shape, strict=True))
        read = tuple((0, n) if i in axes else part
                     for i, (part, n) in enumerate(zip(own, spec.shape, strict=True)))
        readings.setdefault(read, {}).setdefault(own, []).append(device)
    jobs = []
    for read, shards in readings.items():
        region = tuple(slice(*part) for part in read)
        own = [(tuple(slice(*part) for part in bounds), devices)
               for bounds, devices in shards.items()]
        jobs.append(_Job(path, spec.shape, np.dtype(jnp.dtype(spec.dtype)), axes, order, region,
                         own, sharding, scale_sharding, unit))
    return jobs


def scale_sharding_of(sharding, shape, axes: tuple[int, ...]):
    """The sharding of an int8 parameter's scales: as the values', axes of size 1 unsplit."""
    if isinstance(sharding, SingleDeviceSharding):
        return sharding
    if not isinstance(sharding, NamedSharding):
        raise TypeError(f"{sharding!r}: give a NamedSharding, or a QuantizedTensor of shardings.")
    spec = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
    kept = PartitionSpec(*(None if i in axes else part for i, part in enumerate(spec)))
    return NamedSharding(sharding.mesh, kept, memory_kind=sharding.memory_kind)


@partial(jax.jit, static_argnums=3, donate_argnums=0)
def _update(buffer, piece, starts, shape):
    """`buffer` with `piece` at `starts`, which count along the axes of `shape`."""
    return jax.lax.dynamic_update_slice(
        buffer.reshape(shape), piece, [starts[i] for i in range(len(shape))]).reshape(buffer.shape)


@dataclasses.dataclass
class _Job:
    """Fills one region of a parameter on every device that holds a part of it.

    A region within `unit` bytes is put together on the host and moved once, and so is any region
    for a CPU, whose device memory the host buffer becomes; another is written into device memory
    piece by piece, so that it never exists on the host.
    """

    path: str
    shape: tuple[int, ...]
    float_dtype: np.dtype
    axes: tuple[int, ...]  # contracted; empty if the parameter is not quantised
    order: tuple[int, ...]  # of the axes of a parameter that is laid turned; else empty
    region: Region
    shards: list[tuple[Region, list]]  # part of the region -> devices
    sharding: Any
    scale_sharding: Any
    unit: int

    def __post_init__(self):
        self.is_quantized = bool(self.axes)
        self.dtype = np.dtype(np.int8) if self.is_quantized else self.float_dtype
        self.size = int(np.prod([part.stop - part.start for part in self.region]))
        self.on_host = self.size * self.dtype.itemsize <= self.unit or all(
            lives_on_host(device) for _, devices in self.shards for device in devices)
        self.buffers: list[list] | None = None

    @property
    def scale_shape(self) -> tuple[int, ...]:
        return tuple(1 if i in self.axes else n for i, n in enumerate(self.shape))

    def flat(self, shape) -> tuple[int, ...]:
        """The shape in which a part of the parameter is held."""
        if not self.order:
            return tuple(shape)
        first, last = self.axes[0], self.axes[-1] + 1
        return *shape[:first], math.prod(shape[last:]), math.prod(shape[first:last])

    def pieces(self, source: HfSource) -> Iterator[Piece]:
        return source.pieces(self.path, self.region, self.unit, self.dtype.itemsize)

    def write(self, piece: Piece, values: np.ndarray, scale: np.ndarray | None):
        if self.buffers is None:
            self._allocate()
        for shard, (own, devices) in enumerate(self.shards):
            cut = tuple(slice(mine.start - part.start, mine.stop - part.start)
                        if i in self.axes else slice(None)
                        for i, (mine, part) in enumerate(zip(own, piece.region, strict=True)))
            starts = [0 if i in self.axes else part.start - mine.start
                      for i, (mine, part) in enumerate(zip(own, piece.region, strict=True))]
            part, shape = values[cut], [mine.stop - mine.start for mine in own]
            if self.order:
                part = part.transpose(self.order)
                starts, shape = ([x[i] for i in self.order] for x in (starts, shape))
            if self.on_host:
                _place(self.buffers[shard][0].reshape(shape), part, starts)
                continue
            for i, device in enumerate(devices):
                moved = jax.device_put(part, device)
                self.buffers[shard][i] = _update(
                    self.buffers[shard][i], moved, np.asarray(starts, np.int32), tuple(shape))
                # Without waiting, queued pieces would pile up on the host.
                self.buffers[shard][i].block_until_ready()
        if scale is not None:
            _place(self.scale, scale,
                   [part.start - whole.start
                    for part, whole in zip(piece.region, self.region, strict=True)])

    def _allocate(self):
        self.buffers = []
        for own, devices in self.shards:
            shape = self.flat([part.stop - part.start for part in own])
            self.buffers.append(
                [aligned_empty(shape, self.dtype)] if self.on_host
                else [jnp.zeros(shape, self.dtype, device=device) for device in devices])
        self.scale = np.empty([1 if i in self.axes else part.stop - part.start
                               for i, part in enumerate(self.region)], np.float32)

    def finish(self) -> dict[str, list[jax.Array]]:
        """The arrays of this job, one per device; forgets its buffers."""
        result: dict[str, list[jax.Array]] = {"values": [], "scale": []}
        scale = self.scale.reshape(self.flat(self.scale.shape)[:-1]) if self.order else self.scale
        for (_, devices), buffers in zip(self.shards, self.buffers, strict=True):
            for i, device in enumerate(devices):
                result["values"].append(
                    jax.device_put(buffers[0], device) if self.on_host else buffers[i])
                if self.is_quantized:
                    result["scale"].append(jax.device_put(scale, device))
        self.buffers = self.scale = None
        return result


def lives_on_host(device) -> bool:
    return device.platform == "cpu"


def aligned_empty(shape, dtype) -> np.ndarray:
    """An uninitialised array at a 64-byte boundary, which a CPU device takes over uncopied."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start:start + nbytes].view(dtype).reshape(shape)


def _place(buffer: np.ndarray, part: np.ndarray, starts):
    buffer[tuple(slice(i, i + n) for i, n in zip(starts, part.shape, strict=True))] = part
