"""What `launch/full_size_gpu.sh` will run, compiled ahead of time: seconds, memory, kernels.

    python benchmarks/full_size_plan.py --output=benchmarks/results/h200/full_size_plan.jsonl

One line for each pod, dtype and program: the largest of the rows that share a form. Two H200s get
16 layers, four (in int8) and eight all 80, each on the mesh that the script would choose. Needs
the extra plan-gpu and no GPU; compiled, not run. A process for each line, since compilers keep
their memory.
"""

import argparse
import dataclasses
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

GIB = 2**30
# Pod -> layers that are kept, and forms of weights that fit.
PODS = {"h200:1x2": (16, ("", "int8")), "h200:1x4": (80, ("int8",)),
        "h200:1x8": (80, ("", "int8"))}
# Mode, batch, context of a program, and whether int8 alone runs it.
PROGRAMS = (("decode", 1, 1024, False), ("decode", 64, 1024, False), ("decode", 64, 65536, False),
            ("prefill", 1, 65536, False), ("prefill", 1, 262144, False),
            ("prefill", 1, 1048576, True))
CHUNK = 65536


def compiled(pod_name: str, mode: str, batch: int, context: int, quantize: str) -> dict[str, Any]:
    """The line of one program; the process must not have started jax before."""
    from mmx.plan import topology

    topology.prepare_environment()
    import jax

    from mmx.bench.full_model import room
    from mmx.bench.full_size import chosen
    from mmx.bench.whole import STEPS
    from mmx.config import preset
    from mmx.plan import fit, programs
    from mmx.plan.pods import parse_pod
    from mmx.sharding.mesh import parse_axes

    pod, config = parse_pod(pod_name), preset("text01")
    config = config.replace(layer_types=config.layer_types[:PODS[pod_name][0]])
    mesh = chosen(config, pod.devices, "bfloat16", quantize or None)
    job = programs.Job(config, mode, batch, room(context + (STEPS if mode == "decode" else 0)),
                       chunk=CHUNK, quantize=quantize or None)
    texts = []

    def keep(job, mesh, compile_step=programs.compile_step):
        found = compile_step(job, mesh)
        texts.append(found[0].as_text())
        return found
    fit.compile_step = keep
    found = fit.compile_fit(job, pod, parse_axes(mesh))
    row = found.to_json() | {"jax": jax.__version__, "total_gib": found.memory.total / GIB,
                             "limit_gib": found.limit / GIB}
    row["kernels"] = dict(Counter(re.findall(r'custom_call_target="([^"]*)"', "".join(texts))))
    del row["collectives"], row["estimate"]["formulas"]
    return row | {"memory_gib": {name: size / GIB for name, size in dataclasses.asdict(
        found.memory).items()}}


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| pod | layers | dtype | program | mesh | compile s | GiB of one GPU | of it weights "
             "| fits |", "|---|---:|---|---|---|---:|---:|---:|---|"]
    for row in rows:
        name = (f"decode b{row['batch']}c{row['context']}" if row["mode"] == "decode" else
                f"prefill {row['chunk']} of {row['context']}")
        mesh = ",".join(f"{name}={size}" for name, size in row["mesh"].items())
        lines.append(f"| {row['pod']} | {row['layers']} | {row['quantize'] or row['dtype']} | "
                     f"{name} | {mesh} | {row['compile_s']:.0f} | {row['total_gib']:.1f} | "
                     f"{row['memory_gib']['weights']:.1f} | {'yes' if row['fits'] else 'no'} |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True,
                        help="JSON lines; those that are there stay")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        pod, mode, batch, context, quantize = args.child.split("/")
        print(json.dumps(compiled(pod, mode, int(batch), int(context), quantize)))
        return 0
    rows = [json.loads(line) for line in args.output.read_text().splitlines()] if (
        args.output.is_file()) else []
    done = {row["name"] for row in rows}
    for pod, (_, forms) in PODS.items():
        for quantize in forms:
            for mode, batch, context, int8_only in PROGRAMS:
                name = f"{pod}/{mode}/{batch}/{context}/{quantize}"
                if name in done or (int8_only and not quantize):
                    continue
                ended = subprocess.run(
                    [sys.executable, __file__, f"--child={name}", f"--output={args.output}"],
                    capture_output=True, text=True)
                if ended.returncode:
                    print(f"{name}: {ended.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                    continue
                rows.append({"name": name} | json.loads(ended.stdout.splitlines()[-1]))
                print(f"{name}: {rows[-1]['compile_s']} s, {rows[-1]['total_gib']:.1f} GiB",
                      flush=True)
                args.output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
