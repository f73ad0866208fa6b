"""AdamW with global-norm clipping, and the learning-rate schedules."""

import math

import numpy as np
import optax

from mmx.train.config import COSINE, WSD, OptimizerConfig

_NO_DECAY = ("norm", "embed")


def learning_rate(config: OptimizerConfig, steps: int):
    """Returns schedule(step) -> learning rate of the update from `step` to `step + 1`."""
    warmup = min(config.warmup_steps, steps)
    span = (round(config.decay_fraction * steps) if config.schedule == WSD else steps - warmup)
    decay_from = max(warmup, steps - span)

    def schedule(step: int) -> np.float32:
        rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
        # The last update still has a rate above the floor: the floor is reached at `steps`.
        share = min(max((step - decay_from) / max(1, steps - decay_from), 0.0), 1.0)
        if config.schedule == WSD:
            fall = config.final_fraction ** share
        elif config.schedule == COSINE:
            low = config.final_fraction
            fall = low + (1 - low) * 0.5 * (1 + math.cos(math.pi * share))
        else:
            fall = 1.0
        return np.float32(config.peak_lr * rise * fall)

    return schedule


def decays(path: str) -> bool:
    """Whether weight decay applies to the parameter at `path`: matrices but not the embedding."""
    return not any(part.endswith(_NO_DECAY) for part in path.split("/"))


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW on a flat dict of parameters, gradients clipped to a global norm of `clip_norm`.

    Its updates are for a learning rate of 1: the rate of the moment multiplies them, and is data,
    so that another schedule is no other program.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(
            config.weight_decay, lambda params: {path: decays(path) for path in params}),
        optax.scale(-1.0))
