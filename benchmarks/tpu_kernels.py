"""What the TPU compiler makes of the lightning kernels: no TPU is needed, and none is run.

    python benchmarks/tpu_kernels.py [--chips=v5e,v6e] [--kernels=forward,backward] [--json=FILE]

Each kernel is compiled for each chip at 64 heads of 128 and 8,192 tokens in bfloat16, with the
blocks of pallas_kernels/lightning_attention/blocks.json. The columns:

- bundles: VLIW bundles of the final schedule, over the tokens and heads of one grid step. Loops
  over chunks are unrolled, so that the text holds a step's whole work, with what happens once per
  row (tables of decays, first and last states). It compares variants; it is no speed.
- MXU: share of those bundles' matrix slots in use.
- VMEM: blocks twice (one is filled while the other is used) and scratch.
- bytes: what the block specs move, over the floor of reading each input and writing each output
  once, states left out.
- flop/byte: arithmetic over those bytes.
"""

import argparse
import glob
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
TOKENS, HEADS, H = 8192, 64, 128
KERNELS = {"forward": ("lightning_forward", 4), "packed": ("lightning_forward", 4),
           "backward": ("lightning_backward", 7), "decode": ("lightning_decode", 0)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", default=",".join(TOPOLOGIES))
    parser.add_argument("--kernels", default=",".join(KERNELS))
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        compile_one(*args.worker)
        return
    rows = []
    chips, kernels = args.chips.split(","), args.kernels.split(",")
    for what, names, known in (("chip", chips, TOPOLOGIES), ("kernel", kernels, KERNELS)):
        for name in names:
            if name not in known:
                sys.exit(f"No {what} '{name}'. It is one of {', '.join(known)}.")
    for chip, kernel in itertools.product(chips, kernels):
        rows.append(row(chip, kernel))
        print(line(rows[-1]), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(
            {"command": "python benchmarks/tpu_kernels.py", "method": "compiled, not run",
             "tokens": TOKENS, "heads": HEADS, "head_dim": H, "rows": rows}, indent=1) + "\n")


def line(found: dict) -> str:
    return (f"{found['chip']:6} {found['kernel']:16} bundles {found['bundles']:6} = "
            f"{found['bundles_per_token_head']:7.3f}  MXU {found['mxu']:4.0%}  "
            f"VMEM {found['vmem_bytes'] / 2**20:5.2f} MiB  bytes {found['bytes_over_floor']:.3f} "
            f"of floor  {found['flops_per_byte']:6.1f} flop/byte")


def row(chip: str, kernel: str) -> dict:
    """Compiles one kernel in its own process, whose compiler writes its schedule to a folder."""
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
               "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
               "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"}
        env.pop("JAX_COMPILATION_CACHE_DIR", None)  # a cached program writes no schedule
        done = subprocess.run([sys.executable, __file__, "--worker", chip, kernel], env=env,
                              capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{kernel} does not compile for {chip}:\n{done.stderr[-2000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        schedule, = glob.glob(
            f"{folder}/*{KERNELS[kernel][0]}*schedule-analysis_final_bundles.txt")
        used, = glob.glob(
            f"{folder}/*{KERNELS[kernel][0]}*final_hlo-static-per-bundle-utilization.txt")
        bundles = int(re.search(r"total scheduled bundles:\s+(\d+)",
                                Path(schedule).read_text())[1])
        lines = [text.split() for text in Path(used).read_text().splitlines()]
        units = [int(words[0]) for words in lines if len(words) > 5 and words[0].isdigit()]
        capacity, busy = units[0], units[1:]
    return {"chip": chip, "kernel": kernel, "bundles": bundles,
            "bundles_per_token_head": bundles / found.pop("step_tokens_heads"),
            "mxu": sum(busy) / (capacity * bundles), **found}


def compile_one(chip: str, kernel: str):
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from pallas_kernels.lightning_attention import pallas_tpu, pallas_tpu_backward, pallas_tpu_block
    from pallas_kernels.lightning_attention.pallas_tpu_decode import HEADS as ROWS
    from pallas_kernels.lightning_attention.pallas_tpu_decode import decode

    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices
    mesh = Mesh(np.array(devices[:1]), ("x",))

    def aval(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        blocks = pallas_tpu_block.tuned(TOKENS, HEADS)
        x = aval(1, TOKENS, HEADS, H, dtype=jnp.bfloat16)
        state, slopes = aval(1, HEADS, H, H), aval(HEADS)
        starts = aval(1, TOKENS, dtype=jnp.bool_)
        saved = aval(1, TOKENS // blocks.tokens, HEADS, H, H)
        if kernel == "decode":
            pool, one = aval(256, HEADS, H, H), aval(64, HEADS, H, dtype=jnp.bfloat16)
            jax.jit(decode, donate_argnums=4).lower(
                one, one, one, slopes, pool, aval(64, dtype=jnp.int32)).compile()
        elif kernel == "backward":
            jax.jit(lambda q, k, v, s, saved, dout, last: pallas_tpu_backward.backward(
                q, k, v, s, saved, None, None, dout, last, blocks=blocks)).lower(
                    x, x, x, slopes, saved, x, state).compile()
        elif kernel == "forward":
            jax.jit(lambda q, k, v, s, state: pallas_tpu.forward(
                q, k, v, s, state, None, None, blocks=blocks)).lower(
                    x, x, x, slopes, state).compile()
        else:
            jax.jit(lambda q, k, v, s, state, starts: pallas_tpu.forward(
                q, k, v, s, state, starts, None, blocks=blocks)).lower(
                    x, x, x, slopes, state, starts).compile()

    C, tokens, heads, tensor_bytes = blocks.chunk, blocks.tokens, blocks.heads, 2 * TOKENS * H
    if kernel == "decode":
        floor = 8 * H * H  # one state read and written
        found = {"step_tokens_heads": ROWS, "vmem_bytes": 2 * ROWS * (8 * H * H + 4 * 2 * H),
                 "bytes_over_floor": (floor + 4 * 2 * H) / floor,
                 "flops_per_byte": 5 * H * H / (floor + 4 * 2 * H)}
    else:
        passes = KERNELS[kernel][1]
        states = 4 * H * H * (2 + (TOKENS // tokens if kernel == "backward" else 0))
        extra = (4 + 8 * H / C) * TOKENS if "packed" in kernel else 0
        scratch = 4 * heads * (H * H + C * C + 2 * C * H)
        if kernel == "backward":
            scratch += 2 * 2 * blocks.chunks * H * H
        products = 10 if kernel == "backward" else 4
        moved = passes * tensor_bytes + states + extra
        found = {"step_tokens_heads": tokens * heads,
                 "vmem_bytes": 2 * heads * (passes * 2 * tokens * H + 8 * H * H) + scratch,
                 "bytes_over_floor": moved / (passes * tensor_bytes),
                 "flops_per_byte": products * TOKENS * H * (C + H) / moved}
    print(json.dumps({**found, "blocks": vars(blocks)}))


if __name__ == "__main__":
    main()
