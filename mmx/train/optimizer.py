"""AdamW with global-norm clipping, and the learning-rate schedules."""

import jax.numpy as jnp
import optax

from mmx.train.config import COSINE, WSD, OptimizerConfig

_NO_DECAY = ("norm", "embed")


def learning_rate(config: OptimizerConfig, steps: int):
    """Returns schedule(step) -> learning rate of the update from `step` to `step + 1`."""
    warmup = min(config.warmup_steps, steps)
    span = (round(config.decay_fraction * steps) if config.schedule == WSD else steps - warmup)
    decay_from = max(warmup, steps - span)

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        rise = jnp.minimum(1.0, (step + 1) / max(1, warmup)) if warmup else 1.0
        # The last update still has a rate above the floor: the floor is reached at `steps`.
        share = jnp.clip((step - decay_from) / max(1, steps - decay_from), 0.0, 1.0)
        if config.schedule == WSD:
            fall = config.final_fraction ** share
        elif config.schedule == COSINE:
            low = config.final_fraction
            fall = low + (1 - low) * 0.5 * (1 + jnp.cos(jnp.pi * share))
        else:
            fall = 1.0
        return config.peak_lr * rise * fall

    return schedule


def decays(path: str) -> bool:
    """Whether weight decay applies to the parameter at `path`: matrices but not the embedding."""
    return not any(part.endswith(_NO_DECAY) for part in path.split("/"))


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW on a flat dict of parameters, gradients clipped to a global norm of `clip_norm`."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(learning_rate(config, steps), config.b1, config.b2, config.eps,
                    weight_decay=config.weight_decay,
                    mask=lambda params: {path: decays(path) for path in params}))
