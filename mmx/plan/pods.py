"""Accelerators, pods of them, and the names that clouds give them.

Bandwidths are in GB/s (1e9 bytes per second) in one direction, rates in 1e12 operations per second,
memory in GiB (2^30 bytes).
"""

import dataclasses
import difflib
import itertools
import math
import re
from collections.abc import Sequence

from mmx.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator; a device is what jax lists, some chips hold two.

    `hbm_gib` is what a program on one device may use: for TPUs the limit that the compiler
    enforces, for GPUs what the allocator gives less `headroom_gib`. `links` count a device's
    neighbours on the network inside a slice (ICI, or NVLink), `ici_gbps_per_link` is its share of
    one link; `dcn_gbps` is what a host sends to other slices or hosts. `d2d_gbps` joins the two
    devices of a chip. `int8_tops` is None where no figure is published: reckon with bfloat16's.
    """

    name: str
    platform: str            # "tpu" or "cuda"
    devices_per_chip: int
    hbm_gib: float
    hbm_gbps: float
    bf16_tflops: float
    int8_tops: float | None
    ici_gbps_per_link: float
    links: int
    dcn_gbps: float
    devices_per_host: int
    dims: int = 2            # of the torus; hosts x GPUs for GPUs
    largest: int = 256       # chips in one slice
    d2d_gbps: float | None = None
    headroom_gib: float = 0.0
    tf32_tflops: float | None = None
    f32_tflops: float | None = None

    def tops(self, kind: str) -> float:
        """1e12 operations per second in products of an element type, or of "tf32".

        "f32" are float32 products of full precision, "tf32" those that the compiler may round. A
        TPU does the first in six passes of bfloat16, the second in one.
        """
        if kind in ("s8", "u8"):
            return self.int8_tops or self.bf16_tflops
        if kind == "f32":
            return self.f32_tflops or self.bf16_tflops / 6
        return (self.tf32_tflops if kind == "tf32" else None) or self.bf16_tflops

    @property
    def chips_per_host(self) -> int:
        return self.devices_per_host // self.devices_per_chip


# Memory of TPUs: "exceeds available HBM" of the compiler (libtpu 0.0.42). The rest: the pages of
# Google Cloud named beside each chip ("Bidirectional ICI bandwidth per chip" over ports over two;
# "DCN bandwidth per chip" times the four chips of a host), compared in November 2026 for v5e, v5p,
# v6e and tpu7x but for the int8 rate of v5p; ports of v5p and tpu7x, and v4, as far as is known.
CHIPS = {chip.name: chip for chip in (
    # docs.cloud.google.com/tpu/docs/v4: 275 bf16 and int8, 1228 GB/s, 6 ports of 50 GB/s; its two
    # cores compiled as one ("megacore"; apart they have 15.25 each); DCN taken as v5p's.
    Chip("v4", "tpu", 1, 30.75, 1228, 275, 275, 50, 6, 25, 4, dims=3, largest=4096),
    # .../tpu/docs/v5e: 197 and 393, 819 GB/s (800 GiB/s in another edition of the page), 400 GB/s
    # over 4 ports, 6.4 Tbit/s for 256 chips.
    Chip("v5e", "tpu", 1, 15.75, 819, 197, 393, 50, 4, 12.5, 4),
    # .../tpu/docs/v5p: 459, 2765 GB/s, 1200 GB/s over 6 ports, 50 Gbit/s; int8 918 of the launch
    # announcement (cloud.google.com/blog, December 2023).
    Chip("v5p", "tpu", 1, 95.73, 2765, 459, 918, 100, 6, 25, 4, dims=3, largest=8960),
    # .../tpu/docs/v6e: 918 and 1836, 1638 GB/s, 800 GB/s over 4 ports, 100 Gbit/s.
    Chip("v6e", "tpu", 1, 31.24, 1638, 918, 1836, 100, 4, 50, 4),
    # .../tpu/docs/tpu7x: 2307 (fp8 4614, no int8), 7380 GB/s, 1200 GB/s over 6 ports, 100 Gbit/s,
    # all per chip of two devices; their own link is six times one of ICI.
    Chip("tpu7x", "tpu", 2, 94.74, 3690, 1153.5, None, 50, 6, 50, 8, dims=3, largest=9216,
         d2d_gbps=600),
    # NVIDIA's H200 SXM data sheet: 989 and 1979 dense (half of what it says with sparsity), tf32
    # 494 dense, float32 67 (these two not compared again), 4.8 TB/s, NVLink 900 GB/s both ways in
    # 18 links; 8 x 400 Gbit/s per host (cloud.google.com, A3 Ultra). 139 GiB is what the allocator
    # of jax gets of the whole; 5 of them are left to NCCL, cuBLAS and the programs themselves.
    Chip("h200", "cuda", 1, 139.0 - 5.0, 4800, 989, 1979, 25, 18, 400, 8, largest=4096,
         headroom_gib=5.0, tf32_tflops=494, f32_tflops=67),
)}

# Machine types: one host each. A topology after a colon makes a slice of such hosts.
MACHINES = {
    "ct4p-hightpu-4t": "v4:2x2x1",
    "ct5lp-hightpu-1t": "v5e:1x1", "ct5lp-hightpu-4t": "v5e:2x2", "ct5lp-hightpu-8t": "v5e:2x4",
    "ct5p-hightpu-1t": "v5p:1x1x1", "ct5p-hightpu-4t": "v5p:2x2x1",
    "ct6e-standard-1t": "v6e:1x1", "ct6e-standard-4t": "v6e:2x2", "ct6e-standard-8t": "v6e:2x4",
    "tpu7x-standard-1t": "tpu7x:1x1x1", "tpu7x-standard-4t": "tpu7x:2x2x1",
    "a3-ultragpu-8g": "h200:1x8",              # Google Cloud
    "p5en.48xlarge": "h200:1x8",               # Amazon
    "standard_nd96isr_h200_v5": "h200:1x8",    # Azure
}
# Accelerator types NAME-N; N counts chips where a chip has one TensorCore, else TensorCores.
SERIES = {"v4": ("v4", 2), "v5litepod": ("v5e", 1), "v5e": ("v5e", 1), "v5p": ("v5p", 2),
          "v6e": ("v6e", 1), "tpu7x": ("tpu7x", 2)}
_ALIASES = {"v5litepod": "v5e", "v7x": "tpu7x", "ironwood": "tpu7x", "trillium": "v6e"}
_FLAT = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16),
         256: (16, 16)}
_DEEP = {1: (1, 1, 1), 4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}
_CUBE = 64


@dataclasses.dataclass(frozen=True)
class Pod:
    """`slices` equal parts of `topology` chips each (hosts x GPUs for GPUs), joined by DCN."""

    text: str
    chip: Chip
    topology: tuple[int, ...]
    slices: int
    devices: int
    hosts: int

    @property
    def name(self) -> str:
        """The pod by topology, however it was named: "2*v6e:16x16"."""
        shape = f"{self.chip.name}:{'x'.join(map(str, self.topology))}"
        return shape if self.slices == 1 else f"{self.slices}*{shape}"

    @property
    def chips(self) -> int:
        return self.devices // self.chip.devices_per_chip


def parse_pod(text: str) -> Pod:
    """Returns the pod that `text` names.

    By topology "v6e:4x8", "v5p:2x2x4", "h200:2x8" (hosts x GPUs), with "2*" before it for two
    slices; by accelerator type "v6e-32", "v5litepod-64", "v5p-32" and "tpu7x-16" (the last two
    count TensorCores, two to a chip); by machine type "a3-ultragpu-8g", "ct6e-standard-8t".
    Raises UserError for another name, and for a topology that is not built.
    """
    match = re.fullmatch(r"(?:(\d+)\s*[*]\s*)?(\S+)", text.strip().lower())
    slices = int(match[1] or 1) if match else 0
    if slices < 1:
        raise _unknown(text)
    name, _, shape = match[2].partition(":")
    machine = MACHINES.get(name)
    series = re.fullmatch(r"(\w+)-(\d+)", name)
    if machine:
        name, _, whole = machine.partition(":")
        shape = shape or whole
    elif series and series[1] in SERIES and not shape:
        name, cores = SERIES[series[1]]
        shape = "x".join(map(str, _shape_of(text, CHIPS[name], int(series[2]), cores)))
    chip = CHIPS.get(_ALIASES.get(name, name))
    if chip is None or not re.fullmatch(r"\d+(x\d+)*", shape):
        raise _unknown(text)
    topology = tuple(int(size) for size in shape.split("x"))
    if chip.platform == "tpu":
        # A slice may lie any way round; the cloud names its short side first, a lone 1 last.
        topology = tuple(sorted(topology, key=lambda size: (size == 1, size)))
        _check_torus(text, chip, topology)
    else:
        topology = _check_hosts(text, chip, topology)
    devices = math.prod(topology) * chip.devices_per_chip
    return Pod(text, chip, topology, slices, devices * slices, slices * (
        max(1, devices // chip.devices_per_host) if chip.platform == "tpu" else topology[0]))


def _shape_of(text: str, chip: Chip, count: int, cores: int) -> tuple[int, ...]:
    """The usual topology of an accelerator type that counts `cores` for each chip."""
    chips, rest = divmod(count, cores)
    table = _FLAT if chip.dims == 2 else _DEEP
    if not rest and chips in table:
        return table[chips]
    if chip.dims == 3 and not rest and chips and chips % _CUBE == 0:
        cubes = chips // _CUBE
        # The most even box of cubes of 4x4x4.
        sides = min(((a, b, cubes // a // b) for a, b in itertools.product(_divisors(cubes),
                                                                           repeat=2)
                     if cubes % (a * b) == 0), key=lambda box: (sum(box), box))
        return tuple(4 * side for side in sorted(sides))
    sizes = ", ".join(str(size * cores) for size in table)
    raise UserError(f"There is no '{text}'.", f"Its number is one of {sizes}" + (
        f" or a multiple of {_CUBE * cores}." if chip.dims == 3 else "."),
        "Name a topology instead, for example "
        f"'{chip.name}:{'4x8' if chip.dims == 2 else '2x2x4'}'.")


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _check_torus(text: str, chip: Chip, topology: tuple[int, ...]) -> None:
    example = f"For example '{chip.name}:{'4x8' if chip.dims == 2 else '2x2x4'}'."
    if len(topology) != chip.dims:
        raise UserError(f"'{text}' has {len(topology)} dimensions.",
                        f"A slice of {chip.name} has {chip.dims}.", example)
    if math.prod(topology) > chip.largest:
        raise UserError(f"'{text}' has {math.prod(topology)} chips.",
                        f"A slice of {chip.name} has at most {chip.largest}.",
                        "Use several slices, as in "
                        f"'2*{chip.name}:{'16x16' if chip.dims == 2 else '8x8x8'}'.")
    if set(topology) == {1}:
        return
    if any(size < 1 or size % 2 for size in topology[:2]) or topology[-1] < 1:
        raise UserError(f"'{text}' is no whole number of hosts.",
                        f"A host of {chip.name} holds 2x2{'x1' if chip.dims == 3 else ''} chips.",
                        example)
    if chip.dims == 2 and max(topology) > 16:
        raise UserError(f"'{text}' is longer than the torus.",
                        f"{chip.name} is built to 16x16.", example)
    if chip.dims == 3 and not (all(size % 4 == 0 for size in topology)
                               or topology == (2, 2, 1) or set(topology) <= {2, 4}):
        raise UserError(f"'{text}' is not built.",
                        "Slices are 2x2x1, boxes of sides 2 and 4, and from 4x4x4 on boxes whose "
                        "sides are multiples of 4.", example)


def _check_hosts(text: str, chip: Chip, topology: tuple[int, ...]) -> tuple[int, ...]:
    if len(topology) != 2 or not all(topology):
        raise UserError(f"'{text}' does not say how many hosts.",
                        f"{chip.name} is named by hosts x GPUs.", f"For example '{chip.name}:1x8'.")
    hosts, gpus = topology
    if gpus > chip.devices_per_host or (hosts > 1 and gpus != chip.devices_per_host):
        raise UserError(f"'{text}' has {gpus} GPUs on each host.",
                        f"A host holds up to {chip.devices_per_host}, several hosts all of them.",
                        f"For example '{chip.name}:1x4' or '{chip.name}:2x8'.")
    if hosts * gpus > chip.largest:
        raise UserError(f"'{text}' has {hosts * gpus} GPUs.", f"The limit is {chip.largest}.",
                        f"For example '{chip.name}:2x8'.")
    return topology


def wraps(chip: Chip, topology: Sequence[int]) -> tuple[bool, ...]:
    """Returns for each side of a TPU slice whether its ends are joined.

    Sides of 16 of v5e and v6e are; all sides of whole cubes of 4x4x4 of the others.
    """
    if chip.platform != "tpu":
        return (False,) * len(topology)
    if chip.dims == 2:
        return tuple(size == 16 for size in topology)
    return (all(size % 4 == 0 for size in topology),) * len(topology)


def known() -> list[str]:
    """Names that `parse_pod` takes, a topology or a size for each kind."""
    shapes = [f"{chip.name}:{shape}" for chip in CHIPS.values() if chip.platform == "tpu"
              for shape in (("4x8", "16x16") if chip.dims == 2 else ("2x2x4", "4x4x4"))]
    types = [f"{prefix}-{size}" for prefix, (_, cores) in SERIES.items()
             for size in (8 * cores, 16 * cores)]
    return [*shapes, "h200:1x8", "h200:2x8", *types, *MACHINES]


def _unknown(text: str) -> UserError:
    close = difflib.get_close_matches(text.strip().lower(), known(), n=3, cutoff=0.5)
    near = f"Did you mean {' or '.join(repr(name) for name in close)}?" if close else ""
    return UserError(
        f"The pod '{text}' is unknown.",
        f"Chips are {', '.join(CHIPS)} with a topology, as in 'v6e:4x8', 'v5p:2x2x4', 'h200:1x8' "
        "(hosts x GPUs) or '2*v6e:16x16' (two slices); types "
        f"{', '.join(f'{name}-N' for name in SERIES)}; or a cloud's machine type, for example "
        "ct6e-standard-8t, a3-ultragpu-8g, p5en.48xlarge.", near)
