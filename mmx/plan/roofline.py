"""How long a step takes at least: a reckoning from counts and data sheets, never a measurement."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmx.plan.hlo import Collective
from mmx.plan.pods import Chip, wraps

LABEL = "estimate from counts and data sheets; not measured"
# One hop between neighbouring TPUs (jax-ml.github.io/scaling-book, "Sharded Matrices").
HOP_S = 1e-6
# An exchange of GPUs by NCCL: its start, one step of a ring over NVLink, one between hosts (the
# latencies of protocol LL in src/graph/tuning.cc of github.com/NVIDIA/nccl, about release 2.19).
# Between slices of TPUs nothing is counted.
START_S, NVLINK_S, NET_S = 6.6e-6, 0.6e-6, 2.7e-6


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of one step on one device if nothing but compute, memory or network took time.

    `step_s` is the longest of them, as if they overlapped wholly; `serial_s` their sum, as if not
    at all. `by_axes` shares `network_s` out over the mesh axes of the exchanges.
    """

    compute_s: float
    memory_s: float
    network_s: float
    bound: str                                   # "compute", "memory" or "network"
    formulas: tuple[str, ...]
    by_axes: Mapping[tuple[str, ...], float]
    label: str = LABEL

    @property
    def step_s(self) -> float:
        return max(self.compute_s, self.memory_s, self.network_s)

    @property
    def serial_s(self) -> float:
        return self.compute_s + self.memory_s + self.network_s


def estimate(flops: float | Mapping[str, float], hbm_bytes: float,
             collectives: Sequence[Collective], chip: Chip, mesh: Any) -> Estimate:
    """Returns the roofline of one step on one device.

    `flops` counts operations, altogether or by element type (`mmx.plan.hlo.dots_by_type`), which
    run at the rates of `Chip.tops`; kernels that tell no type at bfloat16's. `mesh` is that of
    the program; its devices' places tell torus from network. Sources: ring and torus formulas of
    jax-ml.github.io/scaling-book, "Sharded Matrices"; a group over slices or hosts exchanges in two
    stages.
    """
    kinds = flops if isinstance(flops, Mapping) else {"bf16": flops}
    compute, formulas = 0.0, []
    for kind, count in kinds.items():
        rate = chip.tops(kind)
        compute += count / (rate * 1e12)
        formulas.append(f"compute: {count:.4g} operations ({kind}) / {rate:g}e12 per second "
                        f"= {_told(count / (rate * 1e12))}")
    memory = hbm_bytes / (chip.hbm_gbps * 1e9)
    formulas.append(f"memory: {hbm_bytes:.4g} bytes / {chip.hbm_gbps:g} GB/s = {_told(memory)}")
    by_axes: dict[tuple[str, ...], float] = {}
    places: dict[tuple[str, ...], _Place] = {}
    for one in collectives:
        if one.axes not in places:
            places[one.axes] = _place(one.axes, chip, mesh)
        seconds, formula = _exchange(one, places[one.axes])
        by_axes[one.axes] = by_axes.get(one.axes, 0.0) + one.count * seconds
        formulas.append(f"network: {one.count} x {one.kind} over {'+'.join(one.axes)} "
                        f"({one.group} devices, {one.bytes:.4g} bytes): {formula} each, "
                        f"{_told(one.count * seconds)}")
    network = sum(by_axes.values())
    times = {"compute": compute, "memory": memory, "network": network}
    return Estimate(compute, memory, network, max(times, key=times.get), tuple(formulas), by_axes)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a group of devices lies.

    `islands` are the slices or hosts that it spans, `dcn` a device's GB/s between them. `sides` are
    the torus dimensions that it spans inside one: devices along it, whether its ends are joined,
    GB/s of a device on one link of it. Without sides `inside` is the GB/s of a device, all at once.
    """

    islands: int
    dcn: float
    sides: tuple[tuple[int, bool, float], ...]
    inside: float
    gpus: bool = False

    @property
    def ring(self) -> float:
        """GB/s of one device in a ring: both links of a closed side, one of an open one."""
        return sum(speed * (2 if joined else 1) for _, joined, speed in self.sides) or self.inside

    @property
    def hops(self) -> int:
        return sum(size // 2 if joined else size - 1 for size, joined, _ in self.sides)


def _place(axes: tuple[str, ...], chip: Chip, mesh: Any) -> _Place:
    names = list(mesh.shape)
    group = mesh.devices[tuple(slice(None) if name in axes else 0 for name in names)].reshape(-1)
    dcn = chip.dcn_gbps / chip.devices_per_host
    if not hasattr(group[0], "coords"):
        # Simulated devices: one closed ring.
        return _Place(1, dcn, ((len(group), True, chip.ici_gbps_per_link),), 0.0)
    if chip.platform == "cuda":
        hosts = len({(device.coords[0], device.coords[1]) for device in group})
        return _Place(hosts, dcn, (), chip.ici_gbps_per_link * chip.links, gpus=True)
    slices = [getattr(device, "slice_index", None) or 0 for device in group]
    part = [device for device, number in zip(group, slices, strict=True) if number == slices[0]]
    extent = np.array([device.coords for device in mesh.devices.flat]).max(0) + 1
    joined = (*wraps(chip, [int(size) for size in extent[:chip.dims]]), False, False)
    coords, sides = np.array([device.coords for device in part]), []
    for dim in range(chip.dims):
        at = np.unique(coords[:, dim])
        if len(at) > 1:
            # Groups that lie between one another share the links between their devices.
            stride = int(np.diff(at).min())
            sides.append((len(at), bool(joined[dim] and len(at) * stride == extent[dim]),
                          chip.ici_gbps_per_link / stride))
    return _Place(len(set(slices)), dcn, tuple(sides), chip.d2d_gbps or math.inf)


def _exchange(one: Collective, place: _Place) -> tuple[float, str]:
    """Seconds of one execution, and how they were reckoned."""
    inside, outside = max(1, one.group // place.islands), min(place.islands, one.group)
    size = one.bytes
    twice = 2 if one.kind == "all-reduce" else 1
    stages: list[tuple[float, str]] = []
    if one.kind == "collective-permute":
        if outside > 1:
            stages.append((size / place.dcn, f"bytes / {place.dcn:g} GB/s of DCN"))
        else:
            speed = min((speed for *_, speed in place.sides), default=place.inside)
            hops = one.shift if place.sides else 1
            stages.append((hops * size / speed, f"{hops} x bytes / {speed:g} GB/s"))
        near, far = (2, 1) if outside == 1 else (1, 2)
        return _sum(stages, *_waits(place, near, far, 1, one.shift))
    if one.kind in ("all-to-all", "ragged-all-to-all"):
        if outside > 1:
            part = (outside - 1) / outside
            stages.append((part * size / place.dcn,
                           f"{_share(outside)} x bytes / {place.dcn:g} GB/s of DCN"))
        if inside > 1 and place.sides:
            # The middle of the longest side carries the most.
            seconds, side, joined, speed = max(
                (side / (8 if joined else 4) / speed, side, joined, speed)
                for side, joined, speed in place.sides)
            stages.append((seconds * size / outside, f"{side}/{8 if joined else 4} x bytes"
                           f"{f' / {outside}' if outside > 1 else ''} / {speed:g} GB/s"))
        elif inside > 1:
            stages.append(((inside - 1) / inside * size / outside / place.inside,
                           f"{_share(inside)} x bytes / {place.inside:g} GB/s"))
        return _sum(stages, *_waits(place, inside, outside, 1, place.hops))
    if inside > 1:
        stages.append((twice * (inside - 1) / inside * size / place.ring,
                       f"{'2 x ' if twice == 2 else ''}{_share(inside)} x bytes / "
                       f"{place.ring:g} GB/s"))
    if outside > 1:
        stages.append((twice * (outside - 1) / outside * size / inside / place.dcn,
                       f"{'2 x ' if twice == 2 else ''}{_share(outside)} x bytes"
                       f"{f' / {inside}' if inside > 1 else ''} / {place.dcn:g} GB/s of DCN"))
    return _sum(stages, *_waits(place, inside, outside, twice, twice * place.hops))


def _waits(place: _Place, inside: int, outside: int, twice: int, hops: int) -> tuple[float, str]:
    """Seconds that an exchange takes whatever its bytes, and how they were reckoned."""
    if not place.gpus:
        hops = hops if place.sides else 0
        return hops * HOP_S, f" + {hops} hops of 1 us" if hops else ""
    near, far = twice * (inside - 1), twice * (outside - 1)
    told = f" + a start of {START_S * 1e6:g} us" + "".join(
        f" + {steps} steps of {each * 1e6:g} us"
        for steps, each in ((near, NVLINK_S), (far, NET_S)) if steps)
    return START_S + near * NVLINK_S + far * NET_S, told


def _sum(stages: list[tuple[float, str]], waits: float, waited: str) -> tuple[float, str]:
    seconds = sum(time for time, _ in stages) / 1e9 + waits
    return seconds, f"{' + '.join(text for _, text in stages)}{waited} = {_told(seconds)}"


def _share(count: int) -> str:
    return f"{count - 1}/{count}"


def _told(seconds: float) -> str:
    scale, unit = next(((scale, unit) for scale, unit in ((1, "s"), (1e3, "ms"))
                        if seconds * scale >= 1), (1e6, "us"))
    return f"{seconds * scale:.3g} {unit}"
