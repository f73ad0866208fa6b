"""Measure this machine: `mmx bench kernels`, `period` or `decode`. Medians beside floors that are
reckoned from a copy and a matrix product measured in the same run.

A table goes to stdout; --output also keeps every record, the table and a plot.
"""

import dataclasses
import os
import sys
from pathlib import Path

from mmx.cli.settings import setting
from mmx.cli.shared import check_output, enable_compilation_cache
from mmx.errors import UserError

EXAMPLE = """
mmx bench kernels --output=results/kernels
mmx bench kernels --what=lightning_forward,context --implementation=xla --json
mmx bench period --quantize=int8
mmx bench decode --batch=1,16,64 --context=1024 --peers=transformers
mmx bench decode --batch=1 --trace
"""
WORD = "subject"
SUBJECTS = ("kernels", "period", "decode")


@dataclasses.dataclass(frozen=True)
class BenchSettings:
    subject: str | None = setting(
        None, "What to measure, also without the flag. kernels: each operation in each "
        "implementation. period: prefill of a model. decode: its decode steps.", group="Input",
        choices=SUBJECTS)
    model: str | None = setting(
        None, "Preset or directory whose geometry is taken, with random weights; by default the "
        "real widths (text01, period) on an accelerator and nano on a CPU.", group="Input")
    what: str | None = setting(
        None, "kernels: only these operations; context is the cost per token against the context, "
        "timed only when named.", group="Input", value="NAME,…")
    shapes: str | None = setting(None, "kernels: only these shapes, as the table writes them.",
                                 group="Input", value="SHAPE,…")
    implementation: str | None = setting(
        None, "kernels: only these; by default the automatic choice and all made for this device.",
        group="Input", value="NAME,…")
    check: bool = setting(
        False, "kernels: first compare each implementation with float64; exit code 1 if one fails.",
        group="Input")
    peers: str | None = setting(
        None, "Others to measure in turns: fla (kernels), transformers (period, decode).",
        group="Input", value="NAME,…")
    prompts: str | None = setting(None, "period: tokens of the prompts.", group="Input",
                                  value="N,…")
    prefill_chunk: int | None = setting(
        None, "period: longest piece of a prompt that is read at once; 16,384 on an accelerator.",
        group="Input", low=1)
    batch: str | None = setting(None, "decode: rows of a step; 1,16,64 if not given.",
                                group="Input", value="N,…")
    context: int | None = setting(None, "decode: tokens read before the first step; 1,024 if not "
                                  "given.", group="Input", low=1)
    dtype: str | None = setting(None, "Number format; float32 on a CPU unless given.",
                                choices=("float32", "bfloat16"))
    quantize: str | None = setting(None, "period, decode: int8 weights.", choices=("int8",))
    turned: bool | None = setting(
        None, "period, decode: lay int8 matrices with the contracted axis innermost, as kernels "
        "that multiply integers need them, or not (--noturned); by default where those run: on a "
        "Hopper GPU.")
    rounds: int = setting(5, "Turns of each implementation; 0 with --check only compares.", low=0)
    at_least_ms: float = setting(50.0, "Least time between two readings of the clock.", low=0)
    seed: int = setting(0, "Seed of inputs and weights.", low=0)
    compilation_cache: str = setting(
        "", "Directory that keeps compiled programs for the next start, or 'off'; by default one "
        "of the user's cache.")
    json: bool = setting(False, "Write a JSON line for each record instead of the table.",
                         group="Output")
    trace: bool = setting(
        False, "period, decode: run each row once more under the profiler, and list what the "
        "device did by time.", group="Output")
    output: str | None = setting(
        None, "Folder for results.jsonl, table.md, plot.png and config.gin.", group="Output",
        value="DIR")


Settings = BenchSettings
# Settings that have a meaning for some subjects alone.
_ONLY = {"what": ("kernels",), "shapes": ("kernels",), "implementation": ("kernels",),
         "check": ("kernels",), "prompts": ("period",), "prefill_chunk": ("period",),
         "batch": ("decode",), "context": ("decode",), "quantize": ("period", "decode"),
         "turned": ("period", "decode"), "trace": ("period", "decode")}


def run(call) -> int:
    """Measures; 1 when a check failed or nothing could be measured."""
    settings = call.settings
    refuse(settings)
    numbers = {name: whole_numbers(name, getattr(settings, name)) for name in ("prompts", "batch")}
    output = Path(settings.output) if settings.output else None
    if output is not None:
        check_output(settings.output, folder=True)
    if settings.peers:
        # Both libraries take memory of one device as they need it.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    enable_compilation_cache(settings.compilation_cache)
    from mmx.bench.run import Plan
    from mmx.bench.run import run as measure
    from mmx.bench.timing import Method

    call.announce()
    plan = Plan(
        settings.subject, settings.model, settings.dtype, settings.quantize, settings.turned,
        words(settings.what), words(settings.shapes), words(settings.implementation),
        words(settings.peers), settings.check, numbers["prompts"],
        numbers["batch"] or Plan.batches, settings.context or Plan.context,
        settings.prefill_chunk, Method(settings.rounds, settings.at_least_ms / 1e3),
        settings.seed, output, settings.trace)
    report, code = measure(plan, _say if settings.json else None, call.config)
    if output is not None:
        call.save(output / "config.gin")
    if not settings.json:
        print(report.text())
    sys.stdout.flush()
    return code


def _say(line: str) -> None:
    print(line, flush=True)


def refuse(settings: BenchSettings) -> None:
    """Raises UserError without a subject, for a setting of another one, or for no rounds."""
    subject = settings.subject
    if subject is None:
        raise UserError("There is no subject to measure.", f"It is one of {', '.join(SUBJECTS)}.",
                        "Write for example: mmx bench kernels.")
    for name, subjects in _ONLY.items():
        if getattr(settings, name) not in (None, False) and subject not in subjects:
            raise UserError(f"--{name} is not for 'mmx bench {subject}'.",
                            f"It goes with {' and '.join(subjects)}.", "Leave it out.")
    if settings.turned is not None and settings.quantize is None:
        raise UserError("--turned has no int8 weights to turn.", "It goes with --quantize=int8.",
                        "Add that, or leave it out.")
    if settings.trace and settings.peers:
        raise UserError("--trace and --peers exclude each other.", "A trace is of our side alone.",
                        "Leave one out.")
    if not settings.rounds and not settings.check:
        raise UserError("--rounds=0 measures nothing.", "It goes with --check.",
                        "Ask for at least one round.")


def words(text: str | None) -> tuple[str, ...]:
    """Reads names parted by commas."""
    return tuple(word.strip() for word in (text or "").split(",") if word.strip())


def whole_numbers(name: str, text: str | None) -> tuple[int, ...]:
    """Reads whole numbers from 1 parted by commas; raises UserError for another text."""
    parts = words(text)
    if text is not None and (not parts or not all(
            part.isdecimal() and int(part) > 0 for part in parts)):
        raise UserError(f"--{name}={text!r} is not a list of whole numbers.",
                        "They are 1 or more, parted by commas.", f"Write --{name}=1,16,64.")
    return tuple(map(int, parts))
