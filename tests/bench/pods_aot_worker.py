"""Compiles what `mmx.bench.pods` runs on two H200s, at its own shapes, and prints what is in it.

Arguments: of sequence, experts, lightning, one. `one` is the side of one device, of a topology of
one.
"""

import collections
import json
import re
import sys

from mmx.plan import topology

topology.prepare_environment()

import jax  # noqa: E402

from mmx.bench import pods  # noqa: E402
from mmx.bench.pods_lightning import Lightning  # noqa: E402
from mmx.bench.sides import Side  # noqa: E402
from mmx.bench.whole import Job  # noqa: E402
from mmx.config import preset  # noqa: E402
from mmx.plan import programs  # noqa: E402
from mmx.plan.pods import parse_pod  # noqa: E402
from pallas_kernels import dispatch  # noqa: E402

ASKED = pods.arguments().parse_args(["sequence"])


def described(compiled) -> dict:
    text, memory = compiled.as_text(), programs.memory_of(compiled, {})
    # What is done once per layer is counted once, in a loop or not.
    return {"kernels": dict(collections.Counter(re.findall(
                r'custom_call_target="([^"]*)"', text))),
            "exchanges": dict(collections.Counter(
                kind.removesuffix("-start") for kind in re.findall(
                    r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
                    r"|(?:all-reduce|all-gather|collective-permute)-start)\(", text))),
            "total_bytes": memory.total, "temporary_bytes": memory.temporaries}


def sides(mesh, row: str) -> dict:
    """The programs of a side, kept as they are compiled."""
    kept, config = {}, preset(ASKED.model)
    prompt = Job("prefill", 1, ASKED.tokens, ASKED.chunk * mesh.size)
    decode = Job("decode", ASKED.batch, ASKED.context)
    wanted = {"sequence": [(False, prompt)], "experts": [(False, decode), (True, prompt)],
              "one": [(False, prompt), (False, decode)]}[row]
    for long, job in wanted:
        side = Side(config, mesh, "bfloat16", long)

        def compiled(program, *arguments, side=side, job=job):
            found = program.lower(side.shapes, *arguments).compile()
            kept[f"{row} {job.operation}"] = described(found)
            return found, {}
        side._compiled = compiled
        side.compile(job)
    return kept


def lightning(mesh) -> dict:
    made = Lightning(preset(ASKED.model), mesh, "bfloat16")
    return {f"lightning {name} {mesh.size}": described(program.lower(*shapes).compile())
            for name, program, shapes in (
                ("operation", made.operation_program,
                 made.operation_shapes(ASKED.lightning_tokens)),
                ("layers", made.layers_program,
                 made.layers_shapes(ASKED.lightning_chunk * mesh.size)))}


def main() -> None:
    report = {}
    for row in sys.argv[1:]:
        one = row in ("one", "lightning_one")
        axes = {"tensor": 1} if one else {"expert" if row == "experts" else "sequence": 2}
        mesh = topology.make_mesh(parse_pod(f"h200:1x{1 if one else 2}"), axes)
        with dispatch.compiling_for("gpu"), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            report |= lightning(mesh) if row.startswith("lightning") else sides(mesh, row)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
