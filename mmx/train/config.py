"""What a training run is: plain settings, free of heavy imports, checked when made."""

import dataclasses
import math
from typing import Any

from mmx.data.pipeline import TEXT, SourceConfig
from mmx.errors import UserError

SCHEDULES = WSD, COSINE, CONSTANT = "wsd", "cosine", "constant"
EXPORTS = ("end", "stop", "never")
DTYPES = ("bfloat16", "float32")


def _check(what: str, config: Any, checks) -> None:
    for name, good, rule in checks:
        if not good:
            raise UserError(f"{name}={getattr(config, name)!r} is out of range.",
                            f"It must be {rule}.", f"Set {what}.{name}.")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule; β1, β2 and weight decay are the paper's (arXiv 2501.08313 §4.2).

    schedule: "wsd" (linear warm-up, constant, then exponential decay over the last
    `decay_fraction` of the steps down to `final_fraction` of the peak, the paper's shape),
    "cosine" (warm-up, then cosine to `final_fraction`) or "constant" (warm-up only).
    """

    peak_lr: float = 3e-3
    schedule: str = WSD
    warmup_steps: int = 100
    decay_fraction: float = 0.2
    final_fraction: float = 0.03
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self):
        _check("Optimizer", self, (
            ("peak_lr", self.peak_lr > 0 and math.isfinite(self.peak_lr), "above 0"),
            ("schedule", self.schedule in SCHEDULES, " or ".join(SCHEDULES)),
            ("warmup_steps", self.warmup_steps >= 0, "at least 0"),
            ("decay_fraction", 0 <= self.decay_fraction <= 1, "between 0 and 1"),
            ("final_fraction", 0 < self.final_fraction <= 1, "above 0 and at most 1"),
            ("b1", 0 <= self.b1 < 1, "at least 0 and below 1"),
            ("b2", 0 <= self.b2 < 1, "at least 0 and below 1"),
            ("eps", self.eps > 0, "above 0"),
            ("weight_decay", self.weight_decay >= 0, "at least 0"),
            ("clip_norm", self.clip_norm > 0, "above 0"),
        ))


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """A held-out set: `rows` rows of `seq_len` tokens (0: the training length), always the same.

    name, kind and files as in SourceConfig. batch: rows at once (0: as in training).
    """

    name: str = "heldout"
    kind: str = TEXT
    files: tuple[str, ...] = ()
    rows: int = 64
    seq_len: int = 0
    batch: int = 0

    def __post_init__(self):
        object.__setattr__(self, "files", self.source.files)
        _check("EvalSet", self, (
            ("rows", self.rows >= 1, "at least 1"),
            ("seq_len", self.seq_len >= 0, "at least 0"),
            ("batch", self.batch >= 0, "at least 0"),
        ))

    @property
    def source(self) -> SourceConfig:
        return SourceConfig(self.name, self.kind, self.files)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One run. Steps are optimiser updates of `batch` rows of `seq_len` tokens.

    model: a preset or a directory with a config.json. tokenizer: a directory. run: folder of
    checkpoints, metrics and export. cache: token cache (empty: inside the run). aux_coef: below 0
    takes the model's router_aux_loss_coef. moe_capacity: an expert takes at most this multiple of
    its equal share of a micro-batch's tokens (0: all). max_minutes: stop and save before that much
    wall time is used up (0: no limit). workers: processes that prepare batches (-1: by core count).
    export: write the HF layout at the "end", at every "stop", or "never".
    """

    model: str = "nano"
    tokenizer: str = ""
    run: str = "runs/train"
    cache: str = ""
    init_from: str = ""
    sources: tuple[SourceConfig, ...] = ()
    evals: tuple[EvalConfig, ...] = ()
    optimizer: OptimizerConfig = OptimizerConfig()
    steps: int = 1000
    batch: int = 32
    seq_len: int = 2048
    accumulate: int = 1
    dtype: str = DTYPES[0]
    remat: bool = False
    aux_coef: float = -1.0
    z_coef: float = 0.0
    moe_capacity: float = 0.0
    seed: int = 0
    workers: int = -1
    log_every: int = 10
    eval_every: int = 500
    save_every: int = 1000
    keep: int = 2
    max_minutes: float = 0.0
    export: str = EXPORTS[0]

    def __post_init__(self):
        for name in ("sources", "evals"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        _check("train", self, (
            *((name, getattr(self, name) >= 1, "at least 1")
              for name in ("steps", "batch", "accumulate", "log_every", "keep")),
            *((name, getattr(self, name) >= 0, "at least 0")
              for name in ("eval_every", "save_every", "max_minutes", "z_coef", "moe_capacity",
                           "seed")),
            ("seq_len", self.seq_len >= 2, "at least 2"),
            ("dtype", self.dtype in DTYPES, " or ".join(DTYPES)),
            ("export", self.export in EXPORTS, ", ".join(EXPORTS)),
        ))
        if self.batch % self.accumulate:
            raise UserError(f"batch={self.batch} does not divide by accumulate={self.accumulate}.",
                            "Each micro-batch has the same number of rows.",
                            "Choose accumulate among the divisors of batch.")
        if not self.sources:
            raise UserError("There is nothing to train on.", "A run needs at least one source.",
                            "Give --data=FILE, or bind train.sources in a gin file.")
