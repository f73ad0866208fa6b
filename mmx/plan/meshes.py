"""Meshes that a job can lie on, the likeliest first, from shapes alone."""

import dataclasses
import itertools
import math
from collections.abc import Mapping

from jax.sharding import AbstractMesh, AxisType

from mmx import cache as caches
from mmx import model, quant
from mmx.plan.pods import Pod
from mmx.plan.programs import Job
from mmx.sharding.rules import AXES, partition

# A tensor axis of 8 has one key/value head per device, and its exchanges stay between neighbours.
_BEST_TENSOR = 8
# A TPU copies experts' gate and up, two thirds of the weights, where their columns on a device are
# no multiple of its lanes: 21 GiB of text01 on v6e:4x8 at tensor=16 (576 columns), 42 on v5p:2x2x4.
_LANES = 128


@dataclasses.dataclass(frozen=True)
class Candidate:
    """axes: name -> size in AXES' order. weights, keys_values, states: bytes of one device."""

    axes: Mapping[str, int]
    weights: int
    keys_values: int
    states: int

    @property
    def held(self) -> int:
        return self.weights + self.keys_values + self.states

    @property
    def text(self) -> str:
        return ",".join(f"{name}={size}" for name, size in self.axes.items())


def candidates(job: Job, pod: Pod) -> list[Candidate]:
    """Returns every mesh of the usual shape, the best guess first.

    Experts and heads are shared out; what devices are left over repeat the model for other
    sequences ("data"), or share out time for long prompts ("sequence"). Decoding waits for
    weights, so thin weights come first, and training keeps experts where they are; the other modes
    prefer fewer pieces of the model, as long as it fits.
    """
    config, found = job.config, []
    inner = pod.devices // pod.slices
    spare = "sequence" if job.mode == "long" else "data"
    for tensor, expert in itertools.product(_divisors(config.num_heads),
                                            _divisors(config.num_experts)):
        rest, left = divmod(inner, tensor * expert)
        few, many = sorted((tensor, config.num_kv_heads))
        if left or config.expert_dim % tensor or many % few or tensor > 2 * config.num_kv_heads:
            continue
        sizes = {"slice": pod.slices, spare: rest, "expert": expert, "tensor": tensor}
        axes = {name: sizes[name] for name in AXES if sizes.get(name, 1) > 1} or {"tensor": 1}
        found.append(share(job, axes))
    limit = pod.chip.hbm_gib * 2**30

    def order(one: Candidate):
        tensor = one.axes.get("tensor", 1)
        # Training gathers a layer at a time.
        ragged = (pod.chip.platform == "tpu" and job.mode != "train"
                  and config.expert_dim // tensor % _LANES > 0)
        needed = one.held + (one.weights * 2 // 3 if ragged else 0)
        # A tenth is kept for other temporaries.
        crowded = needed > 0.9 * limit
        copies = one.axes.get("data", 1)
        # A step of training gathers what is split over data, and not what lies over experts.
        few = {"decode": copies, "train": copies}.get(job.mode, 0)
        return (crowded, needed if crowded else 0, ragged, few,
                abs(math.log2(tensor / _BEST_TENSOR)), one.held)

    return sorted(found, key=order)


def share(job: Job, axes: Mapping[str, int]) -> Candidate:
    """Returns what one device holds of a job on a mesh of `axes`; raises nothing for too much."""
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes),
                        axis_types=(AxisType.Auto,) * len(axes))
    rules, weights = job.rules, 0
    specs = model.param_specs(job.config, job.dtype)
    dtype = "float32" if job.mode == "train" else job.dtype
    for path, leaf in quant.abstract_params(job.config, dtype, job.quantize).items():
        names = [None if name == "layers" else name for name in specs[path].axes]
        parts = _parts(partition(rules, mesh, specs[path].shape, names), mesh)
        leaves = (leaf.values, leaf.scale) if hasattr(leaf, "scale") else (leaf,)
        weights += sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves) // parts
    if job.mode == "train":
        return Candidate(axes, weights, 0, 2 * weights)  # two moments of each
    tensor = axes.get("tensor", 1)
    heads = max(job.config.num_kv_heads, tensor)
    shapes = caches.cache_shapes(job.config, job.batch, job.context, job.kv_dtype, heads)
    held = {"k": 0, "v": 0, "state": 0}
    for stack, names in zip(shapes.stacks, caches.cache_axes(shapes).stacks, strict=True):
        for memory, logical in zip(stack, names, strict=True):
            for name, leaf in memory.items():
                parts = _parts(partition(rules, mesh, leaf.shape, logical[name]), mesh)
                held[name] += math.prod(leaf.shape) * leaf.dtype.itemsize // parts
    return Candidate(axes, weights, held["k"] + held["v"], held["state"])


def batch_step(job: Job, axes: Mapping[str, int]) -> int:
    """Returns how many sequences a batch grows by to lie evenly over the mesh."""
    return math.prod(axes.get(name, 1) for name in job.rules.batch)


def _parts(spec, mesh) -> int:
    names = [name for entry in spec if entry
             for name in ((entry,) if isinstance(entry, str) else entry)]
    return math.prod(mesh.shape[name] for name in names)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
