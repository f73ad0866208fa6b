"""Reckoned times: each formula by hand, on meshes whose devices know their places."""

import dataclasses
import types

import numpy as np
import pytest

from mmx.plan.hlo import Collective
from mmx.plan.pods import CHIPS
from mmx.plan.roofline import HOP_S, LABEL, NET_S, NVLINK_S, START_S, estimate


@dataclasses.dataclass(frozen=True)
class Device:
    coords: tuple[int, int, int]
    slice_index: int = 0


def torus(shape, axes, slices=1):
    """Devices of a torus of `shape` in order, seen as a mesh of `axes` (name -> size)."""
    devices = np.empty((slices, *shape), object)
    for index in np.ndindex(*devices.shape):
        devices[index] = Device((*index[1:], *(0,) * (3 - len(shape))), index[0])
    return types.SimpleNamespace(shape=axes, devices=devices.reshape(tuple(axes.values())))


def network(chip, mesh, kind, axes, size, group, shift=0, count=1):
    one = Collective(kind, axes, size, count, group, shift)
    return estimate(0.0, 0.0, [one], CHIPS[chip], mesh).network_s


FLAT = torus((4, 8), {"expert": 4, "tensor": 8})           # v6e:4x8, open sides
CLOSED = torus((16, 16), {"expert": 16, "tensor": 16})     # v6e:16x16, closed sides
CUBE = torus((4, 4, 4), {"expert": 4, "tensor": 16})       # v5p:4x4x4, two sides for tensor
SLICES = torus((4, 4), {"slice": 2, "expert": 4, "tensor": 4}, slices=2)
HOSTS = torus((1, 2, 8), {"slice": 2, "tensor": 8})        # h200:2x8
GB = 1e9

# chip, mesh, kind, axes, bytes, devices, shift -> seconds
CASES = {
    "gather on an open side": (
        ("v6e", FLAT, "all-gather", ("tensor",), GB, 8), 7 / 8 / 100 + 7 * HOP_S),
    "scatter on an open side": (
        ("v6e", FLAT, "reduce-scatter", ("expert",), GB, 4), 3 / 4 / 100 + 3 * HOP_S),
    "sum on an open side is both": (
        ("v6e", FLAT, "all-reduce", ("tensor",), GB, 8), 2 * (7 / 8 / 100 + 7 * HOP_S)),
    "a closed side goes both ways round": (
        ("v6e", CLOSED, "all-gather", ("tensor",), GB, 16), 15 / 16 / 200 + 8 * HOP_S),
    "two closed sides": (
        ("v5p", CUBE, "all-gather", ("tensor",), GB, 16), 15 / 16 / 400 + 4 * HOP_S),
    "to all, open": (
        ("v6e", FLAT, "all-to-all", ("tensor",), GB, 8), 8 / 4 / 100 + 7 * HOP_S),
    "to all, closed": (
        ("v6e", CLOSED, "ragged-all-to-all", ("tensor",), GB, 16), 16 / 8 / 100 + 8 * HOP_S),
    "permute": (
        ("v6e", FLAT, "collective-permute", ("tensor",), GB, 8, 1), 1 / 100 + HOP_S),
    "permute by three": (
        ("v6e", FLAT, "collective-permute", ("tensor",), GB, 8, 3), 3 / 100 + 3 * HOP_S),
    "over slices: DCN alone": (
        ("v6e", SLICES, "all-reduce", ("slice",), GB, 2), 2 / 2 / (50 / 4)),
    "over slices and inside": (
        ("v6e", SLICES, "all-reduce", ("slice", "tensor"), GB, 8),
        2 * (3 / 4 / 100 + 3 * HOP_S) + 2 * 1 / 2 / 4 / (50 / 4)),
    "NVLink": (
        ("h200", HOSTS, "all-gather", ("tensor",), GB, 8), 7 / 8 / 450 + START_S + 7 * NVLINK_S),
    "NVLink, a sum goes round twice": (
        ("h200", HOSTS, "all-reduce", ("tensor",), GB, 8),
        2 * (7 / 8 / 450 + 7 * NVLINK_S) + START_S),
    "NVLink to all": (
        ("h200", HOSTS, "all-to-all", ("tensor",), GB, 8), 7 / 8 / 450 + START_S + 7 * NVLINK_S),
    "NVLink, permute": (
        ("h200", HOSTS, "collective-permute", ("tensor",), GB, 8, 1),
        1 / 450 + START_S + NVLINK_S),
    "between hosts": (
        ("h200", HOSTS, "all-gather", ("slice",), GB, 2), 1 / 2 / 50 + START_S + NET_S),
    "between hosts, permute": (
        ("h200", HOSTS, "collective-permute", ("slice",), GB, 2, 1), 1 / 50 + START_S + NET_S),
}


@pytest.mark.parametrize("name", CASES)
def test_network_time(name):
    arguments, seconds = CASES[name]
    assert network(*arguments) == pytest.approx(seconds, rel=1e-12)


def test_groups_between_one_another_share_links():
    """Every second device of a side of eight: half the speed of a link each."""
    mesh = torus((4, 8), {"expert": 4, "sequence": 4, "tensor": 2})
    assert network("v6e", mesh, "all-gather", ("sequence",), GB, 4) == pytest.approx(
        3 / 4 / 50 + 3 * HOP_S)
    assert network("v6e", mesh, "all-gather", ("tensor",), GB, 2) == pytest.approx(
        1 / 2 / 100 + HOP_S)


def test_counts_add_up_by_axes():
    ones = [Collective("all-gather", ("tensor",), GB, 3, 8),
            Collective("all-gather", ("tensor",), GB, 2, 8),
            Collective("all-gather", ("expert",), GB, 1, 4)]
    found = estimate(0.0, 0.0, ones, CHIPS["h200"], torus(
        (1, 1, 8), {"expert": 1, "tensor": 8}))
    assert found.by_axes[("tensor",)] == pytest.approx(
        5 * (7 / 8 / 450 + START_S + 7 * NVLINK_S))
    assert found.network_s == pytest.approx(sum(found.by_axes.values()))
    assert sum("network" in line for line in found.formulas) == 3


@pytest.mark.parametrize("flops, size, bound", [
    (918e12, 1.0, "compute"), (1.0, 1638e9, "memory"), (1.0, 1.0, "network")])
def test_the_longest_is_the_bound(flops, size, bound):
    ones = [Collective("all-gather", ("tensor",), 5e9, 1, 8)]
    found = estimate(flops, size, ones, CHIPS["v6e"], FLAT)
    assert found.bound == bound
    assert found.step_s == max(found.compute_s, found.memory_s, found.network_s)
    assert found.serial_s == found.compute_s + found.memory_s + found.network_s
    assert found.label == LABEL and "estimate" in LABEL


def test_int8_runs_at_its_own_rate_where_there_is_one():
    counts = {"bf16": 918e12, "s8": 1836e12}
    assert estimate(counts, 0.0, [], CHIPS["v6e"], FLAT).compute_s == pytest.approx(2)
    counts = {"bf16": 1153.5e12, "s8": 1153.5e12}
    assert estimate(counts, 0.0, [], CHIPS["tpu7x"], FLAT).compute_s == pytest.approx(2)


@pytest.mark.parametrize("chip, kind, rate", [
    ("v6e", "f32", 918 / 6), ("v6e", "tf32", 918), ("h200", "f32", 67), ("h200", "tf32", 494)])
def test_float32_runs_at_its_own_rate(chip, kind, rate):
    assert estimate({kind: rate * 1e12}, 0.0, [], CHIPS[chip], FLAT).compute_s == pytest.approx(1)


def test_formulas_say_what_was_reckoned():
    ones = [Collective("all-reduce", ("tensor",), 1e6, 80, 8)]
    lines = estimate(1e12, 1e9, ones, CHIPS["v6e"], FLAT).formulas
    assert lines[0] == "compute: 1e+12 operations (bf16) / 918e12 per second = 1.09 ms"
    assert lines[1] == "memory: 1e+09 bytes / 1638 GB/s = 611 us"
    assert lines[2] == ("network: 80 x all-reduce over tensor (8 devices, 1e+06 bytes): 2 x 7/8 x "
                        "bytes / 100 GB/s + 14 hops of 1 us = 31.5 us each, 2.52 ms")
