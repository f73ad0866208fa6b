"""One run of `mmx bench`: what was asked, the ceilings, then row after row into a report."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmx.bench.timing import Method
from mmx.config import ModelConfig, preset, preset_names
from mmx.errors import UserError
from mmx.obs import log
from mmx.obs.progress import Progress

CHECK_FAILED = 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run as the library takes it; None stands for what suits the device."""

    bench: str                              # "kernels", "period" or "decode"
    model: str | None = None
    dtype: str | None = None
    quantize: str | None = None
    turned: bool | None = None
    what: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    implementations: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    check: bool = False
    prompts: tuple[int, ...] = ()
    batches: tuple[int, ...] = (1, 16, 64)
    context: int = 1024
    chunk: int | None = None
    method: Method = Method()
    seed: int = 0
    output: Path | None = None
    trace: bool = False


def run(plan: Plan, say: Callable[[str], None] | None = None, config_gin: str = ""):
    """Measures; returns the Report and the exit code.

    0 when something was measured, 1 when a check failed or nothing could be measured. `config_gin`
    is the configuration, as gin text, that a process of our side repeats beside a peer.

    Raises UserError for what cannot be asked.
    """
    from mmx.bench import peers as others

    peers = others.check(plan.peers, plan.bench)
    if plan.bench != "kernels" and peers:
        return _beside(plan, say, config_gin)
    bench = _Bench(plan, say)
    if plan.bench == "kernels":
        bench.kernels()
    else:
        bench.whole()
    return bench.finish()


class _Bench:
    """The device, its ceilings and the report of a run in this process."""

    def __init__(self, plan: Plan, say):
        import jax

        from mmx.bench import ceilings, records, report
        from mmx.engine import memory

        # As `mmx.load` and the engine have it.
        memory.one_arena()
        self.plan = plan
        self.full = jax.default_backend() != "cpu"
        if not self.full:
            memory.keep_freed_memory()
        self.name, self.config = geometry(plan, self.full)
        self.dtype = plan.dtype or ("bfloat16" if self.full else "float32")
        self._validate()
        facts = records.facts(plan.bench, self.name, plan.seed, plan.method, plan.peers)
        facts["geometry"] = described(self.name, self.config, self.full)
        log.note("measuring the ceilings …")
        method = dataclasses.replace(plan.method, rounds=max(plan.method.rounds, 1))
        self.ceilings, rows = ceilings.measure(self.full, self.dtype, method, plan.seed)
        facts["ceilings"] = {
            "copy_gb_per_s": self.ceilings.copy / 1e9,
            "product_tflop_per_s": self.ceilings.product / 1e12,
            "product_dtype": self.ceilings.dtype}
        self.report = report.Report(facts, plan.output, say)
        self.report.add(rows)

    def _validate(self) -> None:
        """What can be refused before anything is measured."""
        from mmx.bench import cases, kernels
        from mmx.engine.memory import check_room

        plan = self.plan
        if plan.bench == "kernels":
            kernels.check_names(plan.implementations)
            sizes = cases.FULL if self.full else cases.SMALL
            self.cases = kernels.select(cases.cases(self.config, sizes, self.dtype), plan.what,
                                        plan.shapes)
        else:
            self.jobs = jobs(plan, self.full)
            check_room(self.name, self.config, self.dtype, plan.quantize)

    def kernels(self) -> None:
        from mmx.bench import check, kernels, peers

        plan = self.plan
        peer = peers.fla(self.config, plan.seed) if "fla" in plan.peers else (lambda case: {})
        if plan.check:
            self._check(check.Comparison(
                check.trials(self.config, plan.seed, check.LENGTHS, kernels.compared(self.cases)),
                plan.implementations))
        if not plan.method.rounds:
            return
        with Progress(len(self.cases), "cases", title="bench") as bar:
            for case in self.cases:
                self.report.add(kernels.measure(case, plan.implementations, plan.method,
                                                self.ceilings, plan.seed, peer))
                bar.update(1)

    def _check(self, comparison) -> None:
        """Compares; what was compared before an interrupt or an error is reported as well."""
        try:
            with Progress(comparison.total, "comparisons", title="check") as bar:
                for failures in comparison.run():
                    for failure in failures:
                        log.note(f"failed: {failure}")
                    bar.update(1)
        except BaseException:
            rows = comparison.rows()
            self.report.add(rows)
            log.note(f"stopped after {sum(row['trials'] for row in rows)} of {comparison.total} "
                     f"comparisons\n\n{self.report.text()}")
            raise
        self.report.add(comparison.rows())

    def whole(self) -> None:
        from mmx.bench import whole

        plan = self.plan

        def make():
            log.note(f"drawing the weights of {self.name} …")
            return whole.Model(self.config, self.dtype, plan.quantize, plan.seed, plan.turned)

        with Progress(len(self.jobs), "rows", title="bench") as bar:
            for job, timing, facts in whole.measure(self.jobs, make, plan.method, plan.trace):
                self.report.add([job.row(self.config, self.dtype, plan.quantize, "mmx", timing,
                                         self.ceilings, **facts)])
                bar.update(1)

    def finish(self):
        failed = [row for row in self.report.rows if row.get("passed") is False]
        if self.plan.output is not None and self.plan.method.rounds:
            draw(self.report.rows, self.plan.output)
        return self.report, CHECK_FAILED if failed or not self.report.any_measured else 0


def geometry(plan: Plan, full: bool) -> tuple[str, ModelConfig]:
    """The named model's geometry, or the one that suits the device."""
    from mmx.checkpoint import load_config

    usual = "text01" if plan.bench == "kernels" else "period"
    name = plan.model or (usual if full else "nano")
    return name, preset(name) if name in preset_names() else load_config(name)


def described(name: str, config: ModelConfig, full: bool) -> str:
    from mmx.bench.whole import describe

    small = "" if full else "; small shapes, since this is a CPU"
    return f"{name}: {describe(config)}{small}"


def jobs(plan: Plan, full: bool) -> list:
    """The rows of `period` or `decode`."""
    from mmx.bench.whole import Job

    if plan.bench == "decode":
        return [Job("decode", batch, plan.context) for batch in plan.batches]
    prompts = plan.prompts or ((4096, 16384, 131072) if full else (256, 1024, 4096))
    chunk = plan.chunk or (16384 if full else 1024)
    return [Job("prefill", 1, tokens, min(chunk, tokens)) for tokens in prompts]


def draw(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Writes plot.png, or says why there is none."""
    from mmx.bench import plot

    try:
        plot.draw(rows, folder / "plot.png")
    except UserError as error:
        log.note(f"no plot: {error}")


def _asked(plan: Plan, first: Mapping[str, Any]) -> tuple[ModelConfig, str, list]:
    """Geometry, dtype and rows of a run by a record of our side."""
    full = first["device"]["platform"] != "cpu"
    _, config = geometry(dataclasses.replace(plan, model=first["model"]), full)
    return config, first["ceilings"]["product_dtype"], jobs(plan, full)


def _beside(plan: Plan, say, config_gin: str):
    """Both sides in processes that take turns; this one never opens the device."""
    from mmx.bench import records, report, turns, whole
    from mmx.bench.floors import Ceilings

    if not config_gin:
        raise UserError("A peer is measured by the verb alone.", "Its turns are processes.",
                        "Run `mmx bench` with --peers.")
    mine: list[dict] = []
    theirs: list[dict] = []
    interrupted = None
    try:
        for _ in range(turns.TURNS):
            turns.ours(config_gin, mine)
            # What this device runs where nothing is asked is known once our side has run.
            config, dtype, asked = _asked(plan, mine[0])
            turns.transformers(config, dtype, plan.seed, plan.method, asked, theirs)
    except (KeyboardInterrupt, UserError) as error:
        if not mine:
            raise
        interrupted = error  # what was measured is told first
    first = mine[0]
    config, dtype, asked = _asked(plan, first)
    facts = {key: first[key] for key in records.FACTS} | {"command": records.command()}
    facts["versions"] = first["versions"] | records.versions("", plan.peers)
    facts["method"] = first["method"] | {
        "order": f"a process of each library, {turns.TURNS} turns each"}
    rates = first["ceilings"]
    ceilings = Ceilings(rates["copy_gb_per_s"] * 1e9, rates["product_tflop_per_s"] * 1e12, dtype)
    made = report.Report(facts, plan.output, say)
    made.add([row for row in mine if row["operation"].startswith("ceiling_")][:2])
    for job in asked:
        for side, rows, quantize in (("mmx", mine, plan.quantize), ("transformers", theirs, None)):
            parts = [row for row in rows
                     if (row["operation"], row["shape"]) == (job.operation, job.shape)]
            made.add([job.row(config, dtype, quantize, side, whole.pooled(parts), ceilings)])
    if interrupted is not None:
        raise interrupted
    if plan.output is not None:
        draw(made.rows, plan.output)
    return made, 0 if made.any_measured else CHECK_FAILED
