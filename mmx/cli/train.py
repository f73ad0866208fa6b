"""Train on text files: packed tokens, AdamW, checkpoints that resume exactly, export at the end."""

import contextlib
import dataclasses
from pathlib import Path

from mmx.cli.hosts import HostSettings, joined
from mmx.cli.interrupt import interruptible
from mmx.cli.settings import setting
from mmx.cli.shared import check_output
from mmx.data.pipeline import SourceConfig
from mmx.train.config import DTYPES, EXPORTS, EvalConfig, OptimizerConfig, TrainConfig

EXAMPLE = """
mmx train --gin_file=configs/run/nano.gin --run=runs/nano
mmx train --model=nano --tokenizer=DIR --data='notes/*.txt' --steps=200 --run=runs/notes
mmx train --gin_file=configs/run/nano.gin --run=runs/nano --max_minutes=9   # again to continue
"""
CONFIGURABLES = {"Source": SourceConfig, "EvalSet": EvalConfig, "Optimizer": OptimizerConfig}
_DEFAULT = {field.name: field.default for field in dataclasses.fields(TrainConfig)}


def _of(name: str, help: str, **rules):
    return setting(_DEFAULT[name], help, **rules)


@dataclasses.dataclass(frozen=True)
class Settings(HostSettings):
    model: str = _of("model", "Preset, or directory with a config.json.", group="Model")
    tokenizer: str = setting("", "Directory of the tokenizer; empty: the model's.", group="Model")
    init_from: str = _of("init_from", "Checkpoint whose weights to start from.", group="Model")
    dtype: str = _of("dtype", "Activations; the weights stay float32.", group="Model",
                     choices=DTYPES)
    remat: bool = _of("remat", "Recompute blocks in the backward pass: less memory.",
                      group="Model")
    data: tuple[str, ...] = setting(
        (), "A .txt or .jsonl file or glob to train on, in place of the sources of a gin file.",
        group="Data")
    heldout: tuple[str, ...] = setting(
        (), "A file or glob to evaluate on, in place of the evals of a gin file.", group="Data")
    seq_len: int = _of("seq_len", "Tokens per row.", group="Data", low=2)
    cache: str = _of("cache", "Folder of tokenised files; empty: inside the run.", group="Data")
    workers: int = _of("workers", "Processes that prepare batches; -1: by the number of cores.",
                       group="Data", low=-1, high=256)
    sources: tuple[SourceConfig, ...] = ()
    evals: tuple[EvalConfig, ...] = ()
    optimizer: OptimizerConfig = _DEFAULT["optimizer"]
    peak_lr: float = setting(None, "Learning rate after warm-up, in place of Optimizer.peak_lr.",
                             group="Optimiser", low=0)
    steps: int = _of("steps", "Optimiser updates in all.", group="Optimiser", low=1)
    batch: int = _of("batch", "Rows per update, over all devices.", group="Optimiser", low=1)
    accumulate: int = _of("accumulate", "Micro-batches per update.", group="Optimiser", low=1)
    aux_coef: float = _of("aux_coef", "Weight of the router's balance loss; below 0: the model's.",
                          group="Optimiser")
    z_coef: float = _of("z_coef", "Weight of the squared log-normaliser.", group="Optimiser",
                        low=0)
    moe_capacity: float = _of(
        "moe_capacity", "An expert takes at most this multiple of its equal share of a "
        "micro-batch's tokens; 0: all.", group="Optimiser", low=0)
    seed: int = _of("seed", "Seed of weights and data order.", group="Optimiser", low=0)
    run: str = _of("run", "Folder of checkpoints, metrics and export; resumes what it holds.")
    log_every: int = _of("log_every", "Steps between reports.", low=1)
    eval_every: int = _of("eval_every", "Steps between evaluations; 0: only at the end.", low=0)
    save_every: int = _of("save_every", "Steps between checkpoints; 0: only at the end.", low=0)
    keep: int = _of("keep", "Checkpoints kept.", low=1)
    max_minutes: float = _of("max_minutes", "Save and stop before this much time is up; 0: never.",
                             low=0)
    export: str = _of("export", "When to write the weights in the published layout.",
                      choices=EXPORTS)


def run(call) -> int:
    """Trains; 0 when finished or out of its minutes, 143 when a signal ended it after saving."""
    config = train_config(call.settings)
    with (joined(call.settings.distributed) as pod,
          interruptible(lambda: _interrupted(Path(config.run)))):
        return _train(call, config, pod.is_main)


def _interrupted(run: Path) -> str:
    steps = [int(path.parent.name) for path in run.glob("checkpoints/[0-9]*/extra.json")]
    if not steps:
        return ("Interrupted before the first checkpoint, so no step is kept. The same command "
                "starts anew; --save_every=N keeps a checkpoint every N steps.")
    return (f"Interrupted; the checkpoint of step {max(steps):,} is kept in '{run}'. The same "
            "command goes on from there.")


def _train(call, config: TrainConfig, is_main: bool) -> int:
    from mmx.text import load_tokenizer
    from mmx.train.loop import TERMINATED, load_config, train

    if is_main:
        check_output(config.run, "run", folder=True)
    model_config = load_config(config.model)
    tokenizer = load_tokenizer(config.tokenizer)
    call.announce()
    run = Path(config.run)
    new = is_main and not run.exists()
    save = (lambda: call.save(run / "config.gin")) if is_main else None
    try:
        outcome = train(config, model_config, tokenizer, on_start=save)
    except BaseException:
        if new:
            for folder in (run / "tokens", run):
                with contextlib.suppress(OSError):  # what is not empty stays
                    folder.rmdir()
        raise
    return 143 if outcome.why == TERMINATED else 0


def train_config(settings: Settings) -> TrainConfig:
    """The library's settings out of the verb's: flags for the simple case replace nested ones."""
    values = {name: getattr(settings, name) for name in _DEFAULT}
    if settings.data:
        values["sources"] = (SourceConfig(files=settings.data),)
    if settings.heldout:
        values["evals"] = (EvalConfig(files=settings.heldout),)
    if settings.peak_lr is not None:
        values["optimizer"] = dataclasses.replace(settings.optimizer, peak_lr=settings.peak_lr)
    values["tokenizer"] = settings.tokenizer or _own_tokenizer(settings.model)
    return TrainConfig(**values)


def _own_tokenizer(model: str) -> str:
    import mmx

    embedded = Path(mmx.__file__).parent / "assets" / model
    return str(embedded) if embedded.is_dir() else model
