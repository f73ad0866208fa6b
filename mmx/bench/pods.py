"""Several devices beside one, in turns: `python -m mmx.bench.pods ROW --output=DIR`.

ROW is one of
  sequence   prefill of a long prompt, time over all devices, which each hold all weights; both
             sides are resident and share the weights of the first device
  experts    decode steps, experts over all devices; the sides' weights do not fit together, so each
             is drawn anew for each of its turns
  long       the prompt again in the regime `long`: experts over all devices, and time, too
  lightning  lightning attention without experts, time over all devices: the operation, and a
             period's lightning layers with their projections

Each is a process of its own, as a peak of memory is a process's. Programs are compiled from shapes
first. `mmx.bench.pods_table` puts the rows of several processes into one table.
"""

import argparse
import gc
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import numpy as np

from mmx.bench import ceilings as rates
from mmx.bench import records, report
from mmx.bench.floors import Ceilings
from mmx.bench.pods_lightning import Lightning
from mmx.bench.sides import Program, Side, one_device
from mmx.bench.timing import Method, Timing, first_sentence, in_turns
from mmx.bench.whole import Job, describe
from mmx.config import ModelConfig, preset, preset_names
from mmx.errors import UserError
from mmx.obs import log
from mmx.sharding.mesh import parse_mesh

ROWS = ("sequence", "experts", "long", "lightning")
TURNS = 2
# Operation of a row -> how many times as fast two devices must be, and should be.
BARS = {"prefill": (1.85, 1.95), "lightning_forward": (1.9, None), "lightning_layers": (1.9, None),
        "decode": (1.6, None)}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m mmx.bench.pods", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("row", choices=ROWS)
    add("--model", default="period", choices=preset_names())
    add("--devices", type=int, default=2, help="beside one [%(default)s]")
    add("--dtype", default="", help="bfloat16, or float32 on a CPU")
    add("--quantize", default="", choices=("", "int8"),
        help="weights of sequence and experts, where bfloat16 does not fit one device")
    add("--tokens", type=int, default=262144, help="of the prompt [%(default)s]")
    add("--chunk", type=int, default=16384, help="of a prompt, per device [%(default)s]")
    add("--batch", type=int, default=64, help="rows that decode together [%(default)s]")
    add("--context", type=int, default=1024, help="tokens before decoding [%(default)s]")
    add("--lightning_tokens", type=int, default=1048576, help="[%(default)s]")
    add("--lightning_chunk", type=int, default=131072,
        help="of the layers' input, per device [%(default)s]")
    add("--rounds", type=int, default=5, help="most rounds of a timing [%(default)s]")
    add("--seconds", type=float, default=150, help="after which no round begins [%(default)s]")
    add("--seed", type=int, default=0)
    add("--output", type=Path, help="folder of results.jsonl and table.md")
    return parser


class Bench:
    """The report, the clock, and the two sides of each row."""

    def __init__(self, asked, say=None):
        begin, self.asked = time.monotonic(), asked
        self.end = begin + asked.seconds
        full = jax.default_backend() != "cpu"
        self.dtype = asked.dtype or ("bfloat16" if full else "float32")
        self.quantize = asked.quantize or None
        self.config: ModelConfig = preset(asked.model)
        axis = "expert" if asked.row in ("experts", "long") else "sequence"
        self.meshes = one_device(), parse_mesh(f"{axis}={asked.devices}")
        method = Method(rounds=3)
        self.one, rows = rates.measure(full, self.dtype, method, asked.seed)
        facts = records.facts("pods", asked.model, asked.seed, method, ())
        facts["command"] = shlex.join(["python", "-m", "mmx.bench.pods", *sys.argv[1:]])
        facts["device"] |= {"count": 1, "used": asked.devices}
        facts["geometry"] = (f"{asked.row} over {asked.devices} devices beside one: "
                             f"{describe(self.config)}")
        facts["ceilings"] = {"copy_gb_per_s": self.one.copy / 1e9,
                             "product_tflop_per_s": self.one.product / 1e12,
                             "product_dtype": self.one.dtype, "of": "one device"}
        self.report = report.Report(facts, asked.output, say)
        self.report.add(rows)

    def ceilings(self, devices: int) -> Ceilings:
        return Ceilings(self.one.copy * devices, self.one.product * devices, self.one.dtype)

    def sides(self, kind: Callable, **more) -> list:
        return [kind(self.config, mesh, self.dtype, seed=self.asked.seed, **more)
                for mesh in self.meshes]

    def prompt(self, devices: int) -> Job:
        """The prompt of the rows; a chunk is as long on each device, whatever their number."""
        return Job("prefill", 1, self.asked.tokens,
                   min(self.asked.chunk * devices, self.asked.tokens))

    def run(self) -> None:
        {"sequence": self.sequence, "experts": self.experts, "long": self.long,
         "lightning": self.lightning}[self.asked.row]()

    def add(self, operation: str, make_row: Callable, found: Sequence[tuple[str, int, Timing | str,
                                                                          Mapping]]) -> None:
        """Adds the records of (name, devices, timing, facts), the first of one device."""
        base = next((timing for _, devices, timing, _ in found if devices == 1), None)
        rows = []
        for name, devices, timing, facts in found:
            row = make_row(name, timing, self.ceilings(devices), devices)
            row |= {"operation": operation, "devices": devices, **facts}
            if devices > 1 and isinstance(timing, Timing) and isinstance(base, Timing):
                row["speedup"] = base.median / timing.median
                if devices == 2 and "variant" not in facts:
                    row["must_reach"], row["aim"] = BARS[operation]
            rows.append(row)
        self.report.add(rows)

    def add_job(self, found: Sequence[tuple[Side, Job, Timing | str, Mapping]]) -> None:
        job = found[0][1]

        def make(name, timing, ceilings, devices):
            # What was asked is the same; its chunk differs.
            own = next(job for side, job, _, _ in found if side.name == name)
            return own.row(self.config, self.dtype, self.quantize, name, timing, ceilings)
        self.add(job.operation, make, [
            (side.name, side.mesh.size, timing, facts) for side, _, timing, facts in found])

    def peaks(self) -> list[int]:
        """Most bytes in use so far on each device; empty where the backend counts none."""
        return [stats["peak_bytes_in_use"] for device in self.meshes[1].devices.flat
                if (stats := device.memory_stats()) and "peak_bytes_in_use" in stats]

    def sequence(self) -> None:
        sides = self.sides(Side, quantize=self.quantize)
        jobs = [self.prompt(side.mesh.size) for side in sides]
        programs = together([lambda s=side, j=job: s.compile(j)
                             for side, job in zip(sides, jobs, strict=True)])
        whole = sides[1].weights()
        held = [sides[0].own_part(whole), whole]
        made = {side.name: (lambda p=program, w=weights: p.bind(w))
                for side, program, weights in zip(sides, programs, held, strict=True)}
        timed = in_turns(made, Method(self.asked.rounds), time.monotonic, self.end)
        more = [{}, {"difference": difference(*(program.logits for program in programs))}]
        told = [program.facts | {"peak_bytes": self.peaks()} | extra
                for program, extra in zip(programs, more, strict=True)]
        self.add_job([(side, job, timed[side.name], facts)
                      for side, job, facts in zip(sides, jobs, told, strict=True)])

    def experts(self) -> None:
        decode = Job("decode", self.asked.batch, self.asked.context)
        self._in_own_turns([(side, decode) for side in self.sides(Side, quantize=self.quantize)])

    def long(self) -> None:
        one, many = (Side(self.config, mesh, self.dtype, mesh.size > 1, self.asked.seed,
                          self.quantize) for mesh in self.meshes)
        self._in_own_turns([(side, self.prompt(side.mesh.size)) for side in (one, many)],
                           variant="long")

    def _in_own_turns(self, pairs: Sequence[tuple[Side, Job]], **many_facts) -> None:
        """Times each side's job, its weights drawn anew for each of its turns."""
        programs = dict(zip(pairs, together([lambda p=pair: p[0].compile(p[1])
                                             for pair in pairs]), strict=True))
        found: dict[tuple, list[float] | str] = {pair: [] for pair in pairs}
        try:
            for number in range(TURNS):
                if number and time.monotonic() > self.end:
                    break
                for pair in pairs:
                    self._turn(pair, programs[pair], found)
        finally:
            # An interrupt keeps the turns that were made.
            self.add_job([(*pair, pooled(found[pair]), {
                **programs[pair].facts, "peak_bytes": self.peaks(),
                **(many_facts if pair[0].mesh.size > 1 else {})}) for pair in pairs])

    def _turn(self, pair: tuple[Side, Job], program: Program, found: dict) -> None:
        """One side's turn: its weights are drawn, its job timed, and all is freed."""
        if isinstance(found[pair], str):
            return
        try:
            log.note(f"drawing weights for {pair[0].name} …")
            run = program.bind(pair[0].weights())
            run.call(1)
            for count in range(-(-self.asked.rounds // TURNS)):
                if count and time.monotonic() > self.end:
                    break
                begin = time.perf_counter()
                run.call(1)
                found[pair].append((time.perf_counter() - begin) / run.steps)
        except Exception as error:
            found[pair] = first_sentence(error)
        run = None
        gc.collect()

    def lightning(self) -> None:
        sides = self.sides(Lightning)
        tokens, dims = self.asked.lightning_tokens, {"tokens": self.asked.lightning_tokens}

        def add(operation, work, rounds, runs):
            # What a million tokens take leaves no room for the other side: each has its turns.
            timed: dict[str, list[float] | str] = {side.name: [] for side in sides}
            for number in range(TURNS):
                if number and time.monotonic() > self.end:
                    break
                for side in sides:
                    self._lightning_turn(side.name, -(-rounds // TURNS), partial(runs, side), timed)

            def make(name, timing, ceilings, devices):
                return records.of_work(operation, f"1x{tokens}", dims, self.dtype, name, timing,
                                       work, ceilings, tokens)
            self.add(operation, make, [
                (side.name, side.mesh.size, pooled(timed[side.name]),
                 {"peak_bytes": self.peaks()}) for side in sides])
            gc.collect()

        rounds = self.asked.rounds
        log.note("timing lightning attention …")
        add("lightning_forward", sides[0].operation_work(tokens), rounds,
            lambda side: side.operation_run(tokens))
        log.note("timing the lightning layers …")
        # Seconds each, so a few rounds do.
        add("lightning_layers", sides[0].layers_work(tokens), min(rounds, 3),
            lambda side: side.layers_run(
                tokens, min(self.asked.lightning_chunk * side.mesh.size, tokens)))

    def _lightning_turn(self, name: str, rounds: int, make: Callable, found: dict) -> None:
        if isinstance(found[name], str):
            return
        timing = in_turns({name: make}, Method(rounds), time.monotonic, self.end)[name]
        gc.collect()
        if isinstance(timing, str):
            found[name] = timing
        else:
            found[name] += timing.seconds


def difference(wanted: Sequence, got: Sequence) -> float | None:
    """Norm of the difference of two sides' logits over the norm of the first's."""
    if not wanted or not got:
        return None
    one, two = (np.asarray(logits[0], np.float64) for logits in (wanted, got))
    return float(np.linalg.norm(two - one) / np.linalg.norm(one))


def together(calls: Sequence[Callable]) -> list:
    """Results of calls that mostly wait for the compiler."""
    log.note(f"compiling {len(calls)} programs …")
    with ThreadPoolExecutor(len(calls), thread_name_prefix="compile") as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def pooled(seconds: list[float] | str) -> Timing | str:
    if isinstance(seconds, str):
        return seconds
    return Timing(tuple(seconds), 1) if seconds else "No time was left."


def main(argv: Sequence[str] | None = None) -> int:
    """Measures one row and prints it; 0 when it was measured, 1 when not, 2 for a mistake."""
    asked = arguments().parse_args(argv)
    try:
        if asked.devices < 2 or asked.devices > len(jax.devices()):
            raise UserError(f"--devices={asked.devices} is out of range.",
                            f"It is 2 to {len(jax.devices())}, the devices of this machine.",
                            "On a CPU, XLA_FLAGS=--xla_force_host_platform_device_count=2 has two.")
        bench = Bench(asked, lambda line: print(line, file=sys.stderr, flush=True))
    except UserError as error:
        print(f"pods: {error}", file=sys.stderr)
        return 2
    try:
        bench.run()
    except UserError as error:
        print(f"pods: {error}", file=sys.stderr)
        return 2
    finally:
        print(bench.report.text())
    return 0 if any("speedup" in row for row in bench.report.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
