"""Compiles experts' products of the model's size for chips that are not here; prints memory, bytes.

Arguments: chip/kind/rows/dtype, as in `v6e/hit/1/int8`. Kinds `hit`, `fused` and those of
`mmx.nn.experts` run two layers of 8 experts by a scan; `megablox`, `ragged_dot` and `mosaic_gpu`
are one product of 32 experts, `megablox_grad` one of 8 with its gradients.
"""

import json
import sys

from mmx.plan import topology

topology.prepare_environment()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import Mesh, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

from mmx.nn import experts  # noqa: E402
from mmx.plan import hlo  # noqa: E402
from mmx.plan.pods import parse_pod  # noqa: E402
from pallas_kernels import dispatch, grouped_matmul  # noqa: E402
from pallas_kernels.grouped_matmul.stacked import Stacked  # noqa: E402
from pallas_kernels.quantized import QuantizedTensor  # noqa: E402

PODS = {"v4": "v4:2x2x1", "v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1",
        "tpu7x": "tpu7x:1x1x1", "h200": "h200:1x1"}
D, F, LAYERS, EXPERTS, K = 6144, 9216, 2, 8, 2


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def weight(dtype, *sizes):
    if dtype != "int8":
        return shape(*sizes, dtype=dtype)
    return QuantizedTensor(shape(*sizes, dtype=jnp.int8),
                           shape(*sizes[:-2], 1, sizes[-1], dtype=jnp.float32))


def layers(kind, rows, dtype):
    """A scan over layers, in place for the forms that can."""
    def run(g, share, expert, *stacks):
        def layer(g, given):
            if kind in experts.TAKE_STACKED:
                given = [Stacked(whole, given) for whole in stacks]
            return experts.apply(kind, True, g, share, expert, *given).astype(g.dtype), None

        over = jnp.arange(LAYERS) if kind in experts.TAKE_STACKED else stacks
        return jax.lax.scan(layer, g, over)[0]

    return run, (shape(rows, D), shape(rows, K, dtype=jnp.float32),
                 shape(rows, K, dtype=jnp.int32),
                 weight(dtype, LAYERS, 2, EXPERTS, D, F), weight(dtype, LAYERS, EXPERTS, F, D))


def product(kind, rows, dtype):
    name, differentiated = kind.removesuffix("_grad"), kind.endswith("_grad")
    E = EXPERTS if differentiated else 32

    def run(x, w, sizes, grad):
        def one(x, w):
            return grouped_matmul(x, w, sizes, implementation=name)

        if not differentiated:
            return one(x, w)
        out, back = jax.vjp(one, x, w)
        return out, back(grad)

    return run, (shape(rows, D, dtype=dtype), weight(dtype, E, D, F),
                 shape(E, dtype=jnp.int32), shape(rows, F, dtype=dtype))


def compiled(chip, kind, rows, dtype):
    mesh = Mesh(np.array(topology.devices(parse_pod(PODS[chip]))[:1]), ("x",))
    run, given = (layers if kind in experts.TABLE else product)(kind, rows, dtype)
    given = jax.tree.map(lambda s: jax.ShapeDtypeStruct(
        s.shape, s.dtype, sharding=NamedSharding(mesh, P())), given)
    with dispatch.compiling_for("gpu" if chip == "h200" else "tpu"), \
            jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(run).lower(*given).compile()


def main():
    report = {}
    for argument in sys.argv[1:]:
        chip, kind, rows, dtype = argument.split("/")
        program = compiled(chip, kind, int(rows), dtype)
        report[argument] = {"temp_bytes": program.memory_analysis().temp_size_in_bytes,
                            "bytes": hlo.bytes_accessed(program.as_text())}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
