"""Compiles a lightning layer of the released widths, its time over a pod's devices.

Arguments: cases as `v6e:2x2/131072/forward`: pod, tokens per device, "forward" or "gradient".
Prints {case: what the compiled program sends, moves and computes} as one line of JSON.
"""

import json
import re
import sys

from mmx.plan import topology

topology.prepare_environment()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from mmx.config import preset  # noqa: E402
from mmx.nn.lightning import LightningAttention  # noqa: E402
from mmx.nn.params import Factory  # noqa: E402
from mmx.nn.tokens import Tokens  # noqa: E402
from mmx.parallel.mesh_ops import MeshOps  # noqa: E402
from mmx.plan import hlo  # noqa: E402
from mmx.plan.pods import parse_pod  # noqa: E402
from mmx.sharding.rules import PREFILL  # noqa: E402
from pallas_kernels import dispatch  # noqa: E402

# On TPU a gather runs beside products only where the compiler is told so.
OPTIONS = {"gpu": {}, "tpu": {f"xla_{name}": "true" for name in (
    "enable_async_all_gather", "tpu_enable_async_collective_fusion",
    "tpu_enable_async_collective_fusion_fuse_all_gather")}}


def compiled(name: str, tokens: str, what: str):
    """The layer on one row, from and to a state that every device holds."""
    pod = parse_pod(name)
    mesh = topology.make_mesh(pod, {"sequence": pod.devices})
    ops, config = MeshOps(mesh, PREFILL), preset("text01")
    D, N, H, T = (config.hidden_size, config.num_heads, config.head_dim,
                  int(tokens) * pod.devices)

    def aval(shape, *logical, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=ops.sharding(shape, *logical))

    def module(create):
        return LightningAttention(config, Factory(create, "bfloat16"), 1.0)

    params = {}
    module(lambda spec: params.setdefault(
        spec.path, aval(spec.shape, *[None] * len(spec.shape))))

    def forward(params, h_BTD, slopes_N, state_BNHH):
        return module(lambda spec: params[spec.path])(
            h_BTD, slopes_N, state_BNHH, Tokens(*[None] * 6), ops)

    def gradient(*arguments):
        return jax.grad(lambda *x: forward(*x)[0].astype(jnp.float32).sum(), argnums=(0, 1))(
            *arguments)

    platform = "gpu" if pod.chip.platform == "cuda" else "tpu"
    with dispatch.compiling_for(platform), \
            jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        program = jax.jit({"forward": forward, "gradient": gradient}[what]).lower(
            params, aval((1, T, D), "batch", "time", None), aval((N,), None, dtype=jnp.float32),
            aval((1, N, H, H), *[None] * 4, dtype=jnp.float32)).compile(
                compiler_options=OPTIONS[platform])
    return program, mesh


def behind_the_gather(text: str) -> list[str]:
    """What runs between the start and the end of the states' gather: sources of its lines."""
    entry = text[text.index("\nENTRY"):].splitlines()
    start, done = (next((i for i, line in enumerate(entry) if re.search(
        rf"%(all-gather|async-collective)-{end}\S* = ", line)), 0) for end in ("start", "done"))
    return [found[1] for line in entry[start + 1:done]
            if (found := re.search(r'(?:fusion|custom-call)\(.*op_name="([^"]*)"', line))]


def main():
    report = {}
    for case in sys.argv[1:]:
        program, mesh = compiled(*case.split("/"))
        text = program.as_text()
        report[case] = {
            "collectives": sorted([found.kind, int(found.bytes), found.count]
                                  for found in hlo.collectives(text, mesh)),
            "bytes": hlo.bytes_accessed(text), "flops": hlo.dots_by_type(text),
            "temp": program.memory_analysis().temp_size_in_bytes,
            "behind": behind_the_gather(text)}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
