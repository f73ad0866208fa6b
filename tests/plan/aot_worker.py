"""Compiles a small sharded scan for pods that are not here and prints what is read from it.

Arguments: pods with their meshes, as in `v5e:2x2/expert=2,tensor=2`.
"""

import json
import sys

from mmx.plan import topology

topology.prepare_environment()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

from mmx.plan import hlo, roofline  # noqa: E402
from mmx.plan.pods import parse_pod  # noqa: E402

LAYERS, ROWS, WIDTH = 5, 256, 1024


def compiled(mesh):
    def aval(shape, *spec):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*spec)))

    def exchange(x, gathered):
        x = jax.lax.all_to_all(x, "expert", 1, 0, tiled=True)
        x = jax.lax.ppermute(x, "tensor", [(i, (i + 1) % mesh.shape["tensor"])
                                           for i in range(mesh.shape["tensor"])])
        x = jax.lax.all_to_all(x, "expert", 0, 1, tiled=True)
        return x @ jax.lax.all_gather(gathered, "expert", tiled=True)

    def layer(x_TD, w):
        up_DF, down_FD, whole_DD = w
        x_TD = x_TD + jnp.tanh(x_TD @ up_DF) @ down_FD
        return x_TD + jax.shard_map(
            exchange, mesh=mesh, in_specs=(P("expert"), P("expert")), out_specs=P("expert"),
            check_vma=False)(x_TD, whole_DD), None

    return jax.jit(lambda x_TD, w: jax.lax.scan(layer, x_TD, w)[0]).lower(
        aval((ROWS, WIDTH), "expert"),
        (aval((LAYERS, WIDTH, 4 * WIDTH), None, None, "tensor"),
         aval((LAYERS, 4 * WIDTH, WIDTH), None, "tensor"),
         aval((LAYERS, WIDTH, WIDTH), None, "expert"))).compile()


def main():
    report = {}
    for argument in sys.argv[1:]:
        name, _, axes = argument.partition("/")
        pod = parse_pod(name)
        mesh = topology.make_mesh(pod, {
            key: int(size) for key, _, size in (part.partition("=") for part in axes.split(","))})
        program = compiled(mesh)
        text, memory = program.as_text(), program.memory_analysis()
        found = hlo.collectives(text, mesh)
        reckoned = roofline.estimate(hlo.dots_by_type(text), hlo.bytes_accessed(text), found,
                                     pod.chip, mesh)
        report[argument] = {
            "devices": len(topology.devices(pod)), "axes": dict(mesh.shape),
            "argument_bytes": memory.argument_size_in_bytes,
            "peak_bytes": memory.peak_memory_in_bytes,
            "temp_bytes": memory.temp_size_in_bytes,
            "counts": {f"{one.kind} {'+'.join(one.axes)}": [one.count, one.bytes]
                       for one in found},
            "flops": hlo.dots(text), "bytes": hlo.bytes_accessed(text),
            "open": hlo.open_loops(text), "bound": reckoned.bound, "step": reckoned.step_s}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
