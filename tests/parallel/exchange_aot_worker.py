"""Compiles one layer of experts at the model's size for pods that are not here; prints traffic.

Arguments: POD/MESH/TOKENS/NAME=CHOICE…, as in `v6e:4x8/expert=8,tensor=4/16384/dispatch=ragged`;
TOKENS are those of one device; `train` among the choices adds the gradients, `capacity=FACTOR` a
capacity.
"""

import collections
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
from mmx.plan import hlo, hlo_text, roofline  # noqa: E402
from mmx.plan.pods import parse_pod  # noqa: E402
from mmx.sharding.rules import PREFILL  # noqa: E402
from pallas_kernels import dispatch  # noqa: E402

D, F, E, K = 6144, 9216, 32, 2
# As launch/env.sh sets them.
OPTIONS = {"xla_tpu_enable_async_all_to_all": "true",
           "xla_tpu_enable_async_ragged_all_to_all": "true"}


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
        lowered = jax.jit(trained_run if trained else run).lower(*arguments)
        options = OPTIONS if pod.chip.platform == "tpu" and pod.chip.name != "v5e" else None
        return lowered.compile(compiler_options=options)


def flights(text):
    """[bytes, experts' products between its start and its end] of each exchange of tokens."""
    module = hlo_text.parse(text)
    entry, found = module.computations[module.entry], []
    lines = [*entry.lines]  # in the order of their schedule
    products = [n for n, line in enumerate(lines) if line.op == "custom-call"
                and re.match("grouped_(swiglu|matmul)", line.name)]
    for n, line in enumerate(lines):
        if not re.fullmatch("(ragged-)?all-to-all(-start)?", line.op):
            continue
        sizes = [sum(leaf.bytes for leaf in leaves) for leaves in entry.operand_leaves(line)[:2]]
        if "ragged" not in line.op:
            sizes = sizes[:1]
        if min(sizes) < 1 << 20:
            continue
        users = {user.name for user, _ in entry.users.get(line.name, ()) if "done" in user.op}
        done = next((m for m, user in enumerate(lines) if user.name in users), n)
        found.append([min(sizes), sum(n < product < done for product in products)])
    return found


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
        sent = collections.Counter()
        for one in found:
            sent[f"{one.kind} {'+'.join(one.axes)}"] += one.sent * one.count
        report[argument] = {
            "sent": sent, "network_s": estimate.network_s, "flights": flights(text),
            "temp_bytes": program.memory_analysis().temp_size_in_bytes}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
