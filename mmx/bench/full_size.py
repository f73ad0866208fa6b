"""The whole model on one host of devices: `python -m mmx.bench.full_size --output=DIR`.

Weights are drawn on the devices, then prefill and decode are timed row after row, with each row's
floor (all devices together), compile time, the compiler's bytes and the measured peak, and the
time of its collectives. The step programs are the engine's; `mmx plan` compiles the same step for
devices that are not there. What no time is left for is named in the table.
"""

import argparse
import gc
import json
import math
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from mmx.batch.journal import write_text
from mmx.bench import ceilings as rates
from mmx.bench import collectives, records, report
from mmx.bench.floors import Ceilings
from mmx.bench.full_model import Model
from mmx.bench.timing import Method, Timing, first_sentence
from mmx.bench.whole import STEPS, Job, describe
from mmx.cache import cache_bytes
from mmx.config import preset, preset_names
from mmx.errors import UserError
from mmx.plan import meshes, programs
from mmx.plan.pods import parse_pod
from mmx.sharding.mesh import parse_mesh

# A CPU tells no limit; a small one stands in, so that the search can be tried there.
_CPU_LIMIT = 1 << 26
# The share of a device's memory that a program may fill, as its allocator leaves gaps.
_FILL = 0.97
_GUESSES = 4  # of the longest context
# The full model needs a host of this many; two periods of it stand in on fewer.
_HOST, _FEW_LAYERS = 8, 16


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m mmx.bench.full_size", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="text01", choices=preset_names())
    add("--layers", type=int, default=None, help="keep the first layers only, 0 for all; if left "
        f"out, {_FEW_LAYERS} of text01 on fewer than {_HOST} accelerators, else all")
    add("--mesh", default="", help="as in tensor=8; as `mmx plan` would choose if empty")
    add("--dtype", default="", help="bfloat16, or float32 on a CPU")
    add("--quantize", default="", choices=("", "int8"))
    add("--prompts", default="8192,65536,262144", help="tokens of prompts [%(default)s]")
    add("--batches", default="1,16,64", help="rows that decode together [%(default)s]")
    add("--contexts", default="1024,65536", help="tokens before decoding [%(default)s]")
    add("--chunk", type=int, default=65536, help="tokens prefilled at once [%(default)s]")
    add("--long", type=int, default=0, help="tokens of a prompt also continued; 0 for none [0]")
    add("--seconds", type=float, default=500, help="for everything [%(default)s]")
    add("--seed", type=int, default=0)
    add("--output", type=Path, help="folder of results.jsonl and table.md")
    return parser


def jobs(asked) -> list[tuple[Job, int]]:
    """Rows and the decode steps that follow each, what matters most first."""
    def numbers(text):
        return sorted({int(word) for word in text.split(",") if word})

    def prefill(tokens):
        return Job("prefill", 1, tokens, min(asked.chunk, tokens))

    prompts, contexts = numbers(asked.prompts), numbers(asked.contexts)
    decodes = [[(Job("decode", batch, context), 0) for batch in numbers(asked.batches)]
               for context in contexts]
    reads = [(prefill(tokens), 0) for tokens in prompts]
    long = [(prefill(asked.long), STEPS)] if asked.long else []
    return (decodes[0] if decodes else []) + reads[:2] + long + sum(decodes[1:], []) + reads[2:]


class Bench:
    """The model on its mesh, the report, and the clock."""

    def __init__(self, asked, say=None):
        begin, self.asked = time.monotonic(), asked
        self.end = begin + asked.seconds
        self.count, full = len(jax.devices()), jax.default_backend() != "cpu"
        self.config = config = kept(asked.model, asked.layers, self.count, full)
        self.dtype = asked.dtype or ("bfloat16" if full else "float32")
        self.quantize = asked.quantize or None
        self.mesh_text = asked.mesh or chosen(config, self.count, self.dtype, self.quantize)
        self.mesh = parse_mesh(self.mesh_text)
        self.count = self.mesh.size
        method = Method(rounds=3)
        one, rows = rates.measure(full, self.dtype, method, asked.seed)
        self.ceilings = Ceilings(one.copy * self.count, one.product * self.count, one.dtype)
        facts = records.facts("full_size", asked.model, asked.seed, method, ())
        kind = facts["device"]["kind"]
        facts["command"] = shlex.join(["python", "-m", "mmx.bench.full_size", *sys.argv[1:]])
        # The mesh as a whole is what is measured: one thing of several devices.
        facts["device"] |= {"kind": f"{self.count} × {kind}", "count": 1, "used": self.count}
        facts["geometry"] = f"{asked.model} on {self.mesh_text}: {describe(config)}"
        facts["ceilings"] = {"copy_gb_per_s": self.ceilings.copy / 1e9,
                             "product_tflop_per_s": self.ceilings.product / 1e12,
                             "product_dtype": one.dtype, "of": f"{self.count} times one device's"}
        self.report = report.Report(facts, asked.output, say)
        self.report.add(rows)

    @property
    def limit(self) -> int:
        """Bytes that one device may hold."""
        stats = jax.devices()[0].memory_stats() or {}
        return stats.get("bytes_limit", _CPU_LIMIT)

    def peak(self) -> list[int]:
        """Most bytes in use so far on each device; empty where the backend counts none."""
        return [stats["peak_bytes_in_use"] for device in self.mesh.devices.flat
                if (stats := device.memory_stats()) and "peak_bytes_in_use" in stats]

    def row(self, job: Job, timing, **more) -> None:
        self.add(job.row(self.config, self.dtype, self.quantize, "mmx", timing, self.ceilings,
                         mesh=self.mesh_text, **more))

    def add(self, row: dict) -> None:
        """Adds a row, and writes what the table has no column for beside it."""
        self.report.add([row])
        if self.asked.output is not None:
            write_text(self.asked.output / "details.md", details(self.report.rows))

    def run(self) -> None:
        try:
            model = Model(self.config, self.mesh, self.dtype, self.quantize, self.asked.seed)
        except Exception as error:
            self.initialised(failure(error))
            return
        rate = model.weight_bytes * self.count / model.init_s / 1e9
        self.initialised(Timing((model.init_s,), 1), rate=rate, rate_unit="GB/s",
                         weight_bytes=model.weight_bytes, peak_bytes=self.peak())
        temporaries = 0
        listed = jobs(self.asked)
        # Several at a time, and before a clock counts: one after another they would take it all.
        model.compile_ahead(listed, 0.5 * (self.end - time.monotonic()))
        for number, (job, then) in enumerate(listed):
            left = self.end - time.monotonic()
            # An even share of what is left, twice over: compiling counts, rounds yield first.
            share = 2 * left / (len(listed) - number + 1)
            if left < 5:
                self.row(job, "No time was left.")
                continue
            try:
                if (needed := model.planned(job).get("planned_bytes", 0)) > self.limit:
                    # Not tried out: one device that runs out of memory leaves the others waiting.
                    self.row(job, f"It needs {needed / 2**30:.1f} GiB of each device, which has "
                             f"{self.limit / 2**30:.1f}.", planned_bytes=needed)
                    continue
                timing, found = model.run(job, time.monotonic() + share / 2, collectives.traced,
                                          then)
            except Exception as error:
                self.row(job, failure(error), planned_out_of_memory=out_of_memory(error))
            else:
                if job.operation == "decode" and job.batch == 1:
                    temporaries = found.get("planned_temporaries", 0)
                self.row(job, timing, peak_bytes=self.peak(), **found)
            gc.collect()
        self._largest(model, temporaries)

    def initialised(self, timing, **more) -> None:
        dtype = f"{self.dtype}/{self.quantize}" if self.quantize else self.dtype
        self.add(records.record("initialise", "weights", {}, dtype, "mmx", timing, None,
                                mesh=self.mesh_text, **more))

    def _largest(self, model: Model, temporaries: int) -> None:
        """The longest context of one row that the compiler's count says fits.

        A guess by arithmetic, corrected by what its program needs. Not tried out.
        """
        one, two = (cache_bytes(self.config, 1, size, self.dtype) for size in (1024, 2048))
        tensor = self.mesh.shape.get("tensor", 1)
        parts = math.gcd(tensor, self.config.num_kv_heads) * self.mesh.shape.get("sequence", 1)
        each = (two - one) / 1024 / parts
        room = _FILL * self.limit - model.weight_bytes
        free = room - temporaries - (one - (two - one)) / math.gcd(tensor, self.config.num_heads)
        guess, fits, found, refused = int(free / each) if each else 0, 0, {}, []
        for _ in range(_GUESSES):
            guess = guess // 1024 * 1024
            if guess < 1024 or self.end - time.monotonic() < 5:
                break
            try:
                found = model.planned(Job("decode", 1, guess - STEPS))
            except Exception as error:
                refused.append([guess, first_sentence(error)])
                break
            needed = found.get("planned_bytes", 0) - model.weight_bytes
            if needed <= room:
                fits = guess
                break
            refused.append([guess, f"{found['planned_bytes'] / 2**30:.1f} GiB"])
            guess = int(0.98 * guess * room / needed)
        said = ("Not run: by the compiler's count it fits." if fits else
                "No context was found in the time left.")
        self.add(Job("decode", 1, max(fits - STEPS, 0)).row(
            self.config, self.dtype, self.quantize, "mmx", said, self.ceilings,
            mesh=self.mesh_text, **found, tokens_fit=fits, refused=refused,
            formula=f"planned bytes <= {_FILL} of the limit") | {"operation": "largest_context"})


def details(rows: Sequence[dict]) -> str:
    """Bytes, compile times and collectives of the rows as Markdown.

    A peak is the most since the process began, so its ratio is to the largest plan until then.
    """
    lines = ["| row | dtype | planned GiB | peak GiB | peak / largest plan | compile s | "
             "collectives ms | more |", "|---|---|---:|---:|---:|---:|---|---|"]
    most = 0
    for row in rows:
        if row["operation"].startswith("ceiling_"):
            continue
        plan, peak = row.get("planned_bytes", 0), max(row.get("peak_bytes") or [0])
        most = max(most, 0 if "error" in row else plan)
        spent = row.get("collectives_ms")
        exchanged = "; ".join(f"{kind} {ms:.3g}" for kind, ms in (spent or {}).items())
        if spent is not None:
            exchanged = f"{exchanged or 'none'} ({row.get('collectives_of', '')})"
        more = {name: row[name] for name in ("continued_ms", "length", "finite", "tokens_fit",
                                             "refused") if row.get(name)}
        lines.append("| " + " | ".join([
            f"{row['operation']} {row['shape']}", row["dtype"],
            f"{plan / 2**30:.2f}" if plan else "", f"{peak / 2**30:.2f}" if peak else "",
            f"{peak / most:.3f}" if peak and most else "",
            f"{row['compile_s']:.1f}" if "compile_s" in row else "", exchanged,
            json.dumps(more).replace("|", "\\|") if more else ""]) + " |")
    return "\n".join(lines) + "\n"


def kept(name: str, layers: int | None, count: int, accelerator: bool):
    """The preset with its first `layers`: 0 for all; by itself as many as `count` devices hold."""
    if layers is None and name == "text01" and accelerator and count < _HOST:
        layers = _FEW_LAYERS
    config = preset(name)
    return config.replace(layer_types=config.layer_types[:layers]) if layers else config


def chosen(config, count: int, dtype: str, quantize: str | None) -> str:
    """The mesh that `mmx plan` would try first for decoding on so many H200s."""
    job = programs.Job(config, "decode", 1, 8192, dtype=dtype, quantize=quantize, kv_dtype=dtype)
    return meshes.candidates(job, parse_pod(f"h200:1x{count}"))[0].text


def out_of_memory(error: BaseException) -> bool:
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()


def failure(error: BaseException) -> str:
    text = first_sentence(error)
    return f"Out of memory: {text}" if out_of_memory(error) else text


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints the table; 0 when a row was measured, 1 when none, 2 for a mistake."""
    asked = arguments().parse_args(argv)
    try:
        bench = Bench(asked, lambda line: print(line, file=sys.stderr, flush=True))
        bench.run()
    except UserError as error:
        print(f"full_size: {error}", file=sys.stderr)
        return 2
    print(bench.report.text())
    print()
    print(details(bench.report.rows))
    steps = ("decode", "prefill")
    return 0 if any(row["operation"] in steps and "error" not in row
                    for row in bench.report.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
