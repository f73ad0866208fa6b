"""Compiles one layer of experts at the model's size for pods that are not here; prints traffic.

Arguments: POD/MESH/TOKENS/NAME=CHOICE…, as in `v6e:4x8/expert=8,tensor=4/16384/dispatch=ragged`;
TOKENS are those of one device; `train` among the choices adds the gradients, `capacity=FACTOR` a
capacity.
"""

import json
import re
import sys

from mmx.plan import topology

topology.prepare_environment()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

from mmx.nn import experts  # noqa: E402
from mmx.parallel.mesh_ops import MeshOps  # noqa: E402
from mmx.plan import hlo, roofline  # noqa: E402
from mmx.plan.pods import parse_pod  # noqa: E402
from mmx.sharding.rules import PREFILL  # noqa: E402
from pallas_kernels import dispatch  # noqa: E402

D, F, E, K = 6144, 9216, 32, 2
# What a program's lines that multiply the experts' matrices carry.
PRODUCT = re.compile(r"custom-call\(|convolution\(|kind=kOutput")
SENDS = ("all-to-all", "ragged-all-to-all", "all-gather", "reduce-scatter")


def compiled(pod, mesh, tokens, names):
    names = dict(names)
    trained, capacity = names.pop("train", False), float(names.pop("capacity", 0))
    ops = MeshOps(mesh, PREFILL, names)
    B = mesh.shape["expert"]

    def aval(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    def run(g, weight, expert, gate_up, down):
        def apply(*given):
            return experts.apply(None, not trained, *given)

        return ops.experts(apply, g, weight, expert, gate_up, down, not trained,
                           capacity).astype(g.dtype)

    def trained_run(*given):
        out, back = jax.vjp(lambda g, weight, *w: run(g, weight, given[2], *w), *given[:2],
                            *given[3:])
        return out, back(out)

    lie = ("expert", None, None)
    arguments = (aval((B, tokens, D), jnp.bfloat16, *lie), aval((B, tokens, K), jnp.float32, *lie),
                 aval((B, tokens, K), jnp.int32, *lie),
                 aval((2, E, D, F), jnp.bfloat16, None, "expert", None, "tensor"),
                 aval((E, F, D), jnp.bfloat16, "expert", "tensor"))
    platform = "gpu" if pod.chip.platform == "cuda" else "tpu"
    with dispatch.compiling_for(platform), \
            jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(trained_run if trained else run).lower(*arguments).compile()


def main():
    report = {}
    for argument in sys.argv[1:]:
        name, axes, tokens, *words = argument.split("/")
        pod = parse_pod(name)
        mesh = topology.make_mesh(pod, {
            key: int(size) for key, _, size in (part.partition("=") for part in axes.split(","))})
        names = {key: size or True for key, _, size in (word.partition("=") for word in words)}
        program = compiled(pod, mesh, int(tokens), names)
        text = program.as_text()
        found = hlo.collectives(text, mesh)
        estimate = roofline.estimate(hlo.dots_by_type(text), hlo.bytes_accessed(text), found,
                                     pod.chip, mesh)
        report[argument] = {
            "sent": {f"{one.kind} {'+'.join(one.axes)}": 0 for one in found},
            "network_s": estimate.network_s, "compute_s": estimate.compute_s,
            "memory_s": estimate.memory_s,
            "temp_bytes": program.memory_analysis().temp_size_in_bytes}
        for one in found:
            report[argument]["sent"][f"{one.kind} {'+'.join(one.axes)}"] += one.sent * one.count
        if "dump" in sys.argv[0]:
            pass
    print(json.dumps(report))


if __name__ == "__main__":
    main()
