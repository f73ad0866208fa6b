"""What a program of many layers is made of: each kind of layer, and each kernel, once."""

import inspect
import re
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from mmx import cache as caches
from mmx import model
from mmx.config import LIGHTNING
from mmx.parallel.mesh_ops import MeshOps
from mmx.sharding.rules import LONG
from pallas_kernels import dispatch
from tests import tiny

LAYERS = tiny.config(8, 8, hidden_size=128, num_heads=2, head_dim=64, rotary_dim=32,
                     expert_dim=128)


def lowered(chunk: int, platform: str, **how) -> str:
    """The text of the program that reads a chunk of a prompt in bfloat16."""
    params = {path: spec.abstract for path, spec in model.param_specs(LAYERS).items()}
    cache = caches.cache_shapes(LAYERS, 1, chunk, "bfloat16")
    ids_1T, lengths_1 = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, chunk), (1,)))
    step = jax.jit(partial(model.step, LAYERS, **how))
    return step.trace(params, cache, ids_1T, lengths_1).lower(
        lowering_platforms=(platform,)).as_text()


def h200s(**axes: int) -> AbstractMesh:
    """A mesh of GPUs that are not there."""
    known = inspect.signature(AbstractDevice).parameters
    platform = {"platform": "gpu"} if "platform" in known else {}  # jax 0.10
    return AbstractMesh(tuple(axes.values()), tuple(axes), (AxisType.Auto,) * len(axes),
                        abstract_device=AbstractDevice("NVIDIA H200", None, **platform))


def functions(text: str) -> Counter:
    """How often each function of a program is called."""
    return Counter(re.findall(r"call @(\w+)", text))


def test_layers_of_a_kind_are_one_function():
    calls = functions(lowered(64, "cpu"))
    blocks = {name: count for name, count in calls.items() if re.fullmatch(r"block(_\d+)?", name)}
    kinds = Counter(LAYERS.layer_types)
    assert kinds[LIGHTNING] == 7
    assert sorted(blocks.values()) == sorted(kinds.values())


@pytest.mark.parametrize("axes", [{"data": 1}, {"expert": 2}], ids=str)
def test_a_kernel_is_made_once(axes):
    """For all layers, and all rounds of an exchange: each module is compiled for half a second."""
    mesh, how = h200s(**axes), {}
    if mesh.size > 1:
        how["ops"] = MeshOps(mesh, LONG, {"rows": "all", "groups": 2, "dispatch": "ragged"})
    with dispatch.compiling_for("gpu"), jax.sharding.use_abstract_mesh(mesh):
        text = lowered(1024, "cuda", **how)
    kernels = re.findall(r'@mosaic_gpu_v2.*module = "((?:[^"\\]|\\.)*)".* : (\(tensor.*)', text)
    modules = {module for module, _ in kernels}
    assert len(modules) == len({types for _, types in kernels}) >= 3, [k[1] for k in kernels]
