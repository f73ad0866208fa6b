"""The training loop: data, state, steps, reports, checkpoints, a clean stop."""

import contextlib
import dataclasses
import json
import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np

from mmx import config as geometry
from mmx import flops, model
from mmx.checkpoint.target import check_target
from mmx.data import pipeline
from mmx.data.sources import expand_files, open_cache
from mmx.errors import UserError
from mmx.obs import log
from mmx.obs.progress import Waiting
from mmx.sharding import distributed
from mmx.train import saving
from mmx.train import step as steps
from mmx.train.config import EvalConfig, TrainConfig
from mmx.train.optimizer import learning_rate, make_optimizer
from mmx.train.report import Meter, Reporter, rates

FINISHED, OUT_OF_TIME, TERMINATED = "finished", "out of time", "terminated"
# Steps queued on the device before the host waits: enough to hide it, few enough that a
# non-finite loss is seen within two steps.
_IN_FLIGHT = 2
EXPORT = "export"  # folder of a run
_EVAL_SEED = 1 << 20  # generated samples of evaluations are none of training's


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended: why ("finished", "out of time", "terminated"), at which step, its last
    evaluation, and the exported folder, if any."""

    why: str
    step: int
    evaluation: dict
    export: Path | None


def load_config(name: str) -> geometry.ModelConfig:
    """The geometry of a preset, or of a directory with a config.json."""
    from mmx import checkpoint

    # A preset trains from nothing, so it needs no folder with weights.
    if name in geometry.preset_names():
        return geometry.preset(name)
    return checkpoint.load_config(name)


def train(config: TrainConfig, model_config: geometry.ModelConfig, tokenizer,
          on_start: Callable[[], None] | None = None) -> Outcome:
    """Runs or resumes `config` until its steps, its minutes or SIGTERM end it.

    A run that was stopped and resumed takes the same updates as one that was not. `on_start` is
    called before the first step, when nothing is left to be refused. Raises UserError for data,
    tokenizer or run folders that do not fit, and for a loss that is not finite, naming the step.
    """
    return _Run(config, model_config, tokenizer).go(on_start)


class _Run:
    def __init__(self, config: TrainConfig, model_config, tokenizer):
        self.began = time.monotonic()
        self.config, self.model_config, self.tokenizer = config, model_config, tokenizer
        self.run = Path(config.run)
        if config.export != "never":  # known now, not after the last step
            check_target(self.run / EXPORT, overwrite=True)
        self.mesh = steps.data_mesh()
        self._check_devices()
        self.optimizer = make_optimizer(config.optimizer)
        for source in (*config.sources, *(each.source for each in config.evals)):
            expand_files(source.files)  # before hours of tokenising others
        pod = distributed.current()
        if not pod.is_main:
            pod.barrier("tokens")  # process 0 tokenises, the others find it done
        self.plan = self._plan(config.sources, config.seq_len)
        self.eval_plans = [self._plan([each.source], each.seq_len or config.seq_len, shuffle=False)
                           for each in config.evals]
        if pod.is_main:
            pod.barrier("tokens")
        aux_coef = (config.aux_coef if config.aux_coef >= 0
                    else model_config.router_aux_loss_coef)
        self.how = steps.StepConfig(config.dtype, config.accumulate, aux_coef, config.z_coef,
                                    config.remat, len(config.sources), config.moe_capacity)
        self.update = steps.make_train_step(model_config, config.optimizer, self.how)
        self.evaluate_batch = steps.make_eval_step(model_config, self.how)
        self.rate_at = learning_rate(config.optimizer, config.steps)
        self.evaluation: dict = {}
        self.stop_signal = False
        self.save_seconds = 0.0

    def _check_devices(self):
        config, devices = self.config, self.mesh.devices.size
        if config.batch // config.accumulate % devices:
            raise UserError(
                f"{config.batch // config.accumulate} rows of a micro-batch do not divide over "
                f"{devices} devices.", "Each device takes the same number of rows.",
                f"Make batch / accumulate a multiple of {devices}.")
        size = self.tokenizer.vocab_size
        if size > self.model_config.vocab_size:
            raise UserError(
                f"The tokenizer has {size} ids and the model {self.model_config.vocab_size}.",
                "Every id needs an embedding row.",
                "Use the model's own tokenizer, or a model with a larger vocab_size.")

    def _plan(self, sources, seq_len, shuffle=True):
        last = [0.0]

        def progress(name, done, total):
            if time.monotonic() - last[0] > 5 or done == total:
                last[0] = time.monotonic()
                log.note(f"tokenising {name}: {done / 1e6:,.1f} of {total / 1e6:,.1f} MB")

        if not self.tokenizer.eos_ids:
            raise UserError("The tokenizer names no end-of-sentence token.",
                            "Documents are packed with one between them.",
                            "Name it as eos_token in tokenizer_config.json.")
        config = self.config
        return pipeline.prepare(
            sources, config.tokenizer, self.tokenizer, min(self.tokenizer.eos_ids),
            config.cache or self.run / "tokens", seq_len,
            config.seed + (0 if shuffle else _EVAL_SEED), shuffle, progress)

    def identity(self) -> dict:
        """What must not change between the parts of one run."""
        config = self.config
        return {
            "model": json.loads(json.dumps(dataclasses.asdict(self.model_config))),
            "data": [[source.kind, source.weight, source.loss_weight, Path(cache).name]
                     for source, cache in zip(config.sources, self.plan.caches, strict=True)],
            "seq_len": config.seq_len, "seed": config.seed,
        }

    def settings(self) -> dict:
        """What shapes the updates and may change between the parts of one run, which is told."""
        config = self.config
        names = "batch", "accumulate", "steps", "dtype", "aux_coef", "z_coef", "moe_capacity"
        return {name: getattr(config, name) for name in names} | {
            f"Optimizer.{name}": value
            for name, value in dataclasses.asdict(config.optimizer).items()}

    def initial_state(self):
        """The state to start from and the number of rows already used."""
        everywhere = steps.replicated(self.mesh)
        specs = model.param_specs(self.model_config, "float32")
        make = partial(steps.init_state, optimizer=self.optimizer)
        abstract = jax.eval_shape(make, {path: spec.abstract for path, spec in specs.items()})
        newest = self._agreed(saving.latest(self.run))
        if newest is not None:
            abstract = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), abstract)
            if newest > self.config.steps:
                raise UserError(f"{self.run} is at step {newest:,}, beyond steps="
                                f"{self.config.steps:,}.", "steps counts all updates of a run.",
                                "Raise steps, or use another run.")
            state, extra = saving.restore(self.run, newest, abstract, self.identity())
            log.note(f"resuming {self.run} at step {newest:,}")
            before = extra.get("settings", {})
            for name, now in self.settings().items():
                if (was := before.get(name, now)) != now:
                    log.note(f"{name} was {was!r} and is {now!r} from step {newest + 1:,} on")
            return state, extra["rows"]
        shardings = dict.fromkeys(specs, everywhere)
        if self.config.init_from:
            from mmx.checkpoint import load_params

            found, params = load_params(self.config.init_from, dtype="float32",
                                        shardings=shardings)
            self._check_same_shapes(found, specs)
        else:
            params = model.init_params(self.model_config, jax.random.key(self.config.seed),
                                       "float32", shardings)
        return jax.jit(make, out_shardings=everywhere)(params), 0

    def _agreed(self, step: int | None) -> int | None:
        """Process 0's answer: a shared file system may show the others an older listing."""
        if jax.process_count() == 1:
            return step
        from jax.experimental import multihost_utils

        first = int(multihost_utils.broadcast_one_to_all(
            np.int32(-1 if step is None else step)))
        return None if first < 0 else first

    def _check_same_shapes(self, found, specs):
        theirs = model.param_specs(found, "float32")
        if {p: s.shape for p, s in theirs.items()} != {p: s.shape for p, s in specs.items()}:
            raise UserError(f"The weights of {self.config.init_from} have another shape than "
                            f"model '{self.config.model}'.", "Training starts from equal shapes.",
                            f"Set --model={self.config.init_from}.")

    def go(self, on_start: Callable[[], None] | None = None) -> Outcome:
        config = self.config
        state, rows = self.initial_state()
        step = int(state.step)
        self.reporter = Reporter(self.run, config.steps, step)
        if on_start:
            on_start()
        self._say_start(step)
        workers = pipeline.default_workers() if config.workers < 0 else config.workers
        batches = pipeline.batches(
            self.plan, rows, config.batch, process=jax.process_index(),
            processes=jax.process_count(), workers=workers, ahead=max(4, 2 * workers))
        why = FINISHED
        meter = self._meter()
        pending: deque = deque()

        def settle(limit):
            while len(pending) > limit:
                number, metrics = pending.popleft()
                metrics = jax.device_get(metrics)
                self._check_finite(number, metrics)
                meter.add(metrics)

        with self._signals(), contextlib.closing(batches):
            first = step + 1
            while step < config.steps:
                batch = steps.put_batch(self.mesh, next(batches))
                compiles = step + 1 == first
                with Waiting("compiling the step …") if compiles else contextlib.nullcontext():
                    state, metrics = self.update(state, batch, self.rate_at(step))
                    step, rows = step + 1, rows + config.batch
                    pending.append((step, metrics))
                    settle(0 if compiles else _IN_FLIGHT)
                if compiles:
                    meter.start()
                if step % config.log_every == 0:
                    settle(0)
                    self._log(step, meter)
                if config.eval_every and step % config.eval_every == 0:
                    settle(0)
                    with meter.paused():
                        self._evaluate(step, state.params)
                why = self._why_stop(step)
                if why or config.save_every and step % config.save_every == 0:
                    settle(0)
                    with meter.paused():
                        self._save(step, state, rows)
                if why:
                    break
            settle(0)
        why = why or FINISHED
        if why == FINISHED and not (config.eval_every and step % config.eval_every == 0):
            self._evaluate(step, state.params)
        export = self._export(state.params, why)
        log.note(f"{why} at step {step:,} of {config.steps:,}; {self.run}"
                 + ("" if why == FINISHED else "; run the same command again to continue"))
        return Outcome(why, step, self.evaluation, export)

    def _why_stop(self, step: int) -> str:
        if step >= self.config.steps:
            return FINISHED
        if jax.process_count() > 1:
            if step % self.config.log_every:
                return ""
            from jax.experimental import multihost_utils

            # Hosts must stop at the same step, so the first to wish it decides for all.
            wishes = multihost_utils.process_allgather(
                np.asarray([self.stop_signal, self._time_is_up()]))
            terminate, late = np.asarray(wishes).reshape(-1, 2).any(axis=0)
        else:
            terminate, late = self.stop_signal, self._time_is_up()
        return TERMINATED if terminate else OUT_OF_TIME if late else ""

    def _time_is_up(self) -> bool:
        limit = 60 * self.config.max_minutes
        # Room for the last checkpoint, evaluation and export.
        margin = max(2 * self.save_seconds, min(15.0, 0.1 * limit))
        return bool(limit) and time.monotonic() - self.began > limit - margin

    @contextlib.contextmanager
    def _signals(self):
        def on_signal(number, frame):
            self.stop_signal = True

        try:
            before = signal.signal(signal.SIGTERM, on_signal)
        except ValueError:  # not the main thread: the caller owns signals
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _meter(self) -> Meter:
        caches = [open_cache(path) for path in self.plan.caches]
        per_byte = [cache.tokens_per_byte if source.kind == pipeline.TEXT else math.nan
                    for cache, source in zip(caches, self.config.sources, strict=True)]
        peak = self.mesh.devices.size * flops.peak_flops(self.mesh.devices.flat[0].device_kind)
        return Meter([source.name for source in self.config.sources], per_byte,
                     self.config.batch * self.config.seq_len,
                     flops.train_flops(self.model_config, self.config.seq_len), peak)

    def _check_finite(self, number: int, metrics) -> None:
        for name in ("loss", "grad_norm"):
            if not np.isfinite(metrics[name]):
                raise UserError(
                    f"The {name.replace('_', ' ')} of step {number:,} is {float(metrics[name])}.",
                    "Training stops at the first number that is not finite; the last checkpoint "
                    "is from before.", "Lower Optimizer.peak_lr or lengthen warmup_steps, and "
                    "resume.")

    def _log(self, step: int, meter: Meter) -> None:
        if meter.steps:
            record = meter.record(step, float(self.rate_at(step - 1)))
            left = (self.config.steps - step) * self.config.batch * self.config.seq_len
            self.reporter.write({**record, "tokens_left": left})

    def _evaluate(self, step: int, params) -> None:
        record = {"step": step}
        for each, plan in zip(self.config.evals, self.eval_plans, strict=True):
            record.update(self._evaluate_set(each, plan, params))
        if len(record) > 1:
            self.evaluation = record
            self.reporter.write(record)

    def _evaluate_set(self, each: EvalConfig, plan, params) -> dict:
        rows, rows_at_once = self._eval_rows(each, plan)
        batches = pipeline.batches(plan, 0, rows_at_once, process=jax.process_index(),
                                   processes=jax.process_count(), ahead=1)
        sums = {"nll": 0.0, "targets": 0.0, "right": 0.0}
        with contextlib.closing(batches):
            for _ in range(rows // rows_at_once):
                got = self.evaluate_batch(params, steps.put_batch(self.mesh, next(batches)))
                for name in sums:
                    sums[name] += float(got[name])
        cache = open_cache(plan.caches[0])
        per_byte = cache.tokens_per_byte if each.kind == pipeline.TEXT else math.nan
        return rates(each.name, sums["nll"], max(sums["targets"], 1.0), sums["right"], per_byte)

    def _eval_rows(self, each: EvalConfig, plan) -> tuple[int, int]:
        """Rows to score, none twice, and rows at once: a divisor that splits over the devices."""
        devices = self.mesh.devices.size
        rows = each.rows
        if each.kind == pipeline.TEXT:
            rows = min(rows, max(1, open_cache(plan.caches[0]).num_tokens // plan.seq_len))
        rows = max(rows // devices, 1) * devices
        most = min(each.batch or self.config.batch // self.config.accumulate, rows)
        at_once = max(most // devices, 1) * devices
        while rows % at_once:
            at_once -= devices
        return rows, at_once

    def _save(self, step: int, state, rows: int) -> None:
        began = time.monotonic()
        extra = {"rows": rows, "identity": self.identity(), "settings": self.settings()}
        saving.save(self.run, step, state, extra, self.config.keep, self.model_config)
        self.save_seconds = max(self.save_seconds, time.monotonic() - began)

    def _export(self, params, why: str) -> Path | None:
        wanted = {"end": why == FINISHED, "stop": True, "never": False}[self.config.export]
        if not wanted:
            return None
        from mmx.checkpoint.hf_export import save_hf

        folder = self.run / EXPORT
        save_hf(folder, self.model_config, params, layout="original", dtype="bfloat16",
                tokenizer_dir=self.config.tokenizer, overwrite=True)
        return folder

    def _say_start(self, step: int) -> None:
        config, device = self.config, self.mesh.devices.flat[0]
        count = model.param_count(self.model_config)
        tokens = config.batch * config.seq_len
        log.note(f"{config.model}: {count / 1e6:,.1f} M parameters on {self.mesh.devices.size} × "
                 f"{device.device_kind}; {config.steps - step:,} steps of {tokens:,} tokens; "
                 f"{os.path.relpath(self.run)}")
        for source, path in zip(config.sources, self.plan.caches, strict=True):
            cache = open_cache(path)
            log.note(f"  {source.name}: {source.kind}, {cache.num_docs:,} documents, "
                     f"{cache.num_tokens / 1e6:,.2f} M tokens, "
                     f"{1 / cache.tokens_per_byte:.2f} bytes per token, weight {source.weight:g}")
