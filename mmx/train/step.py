"""One optimiser step and one evaluation step as jitted functions of (state, batch)."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmx import model
from mmx.config import ModelConfig
from mmx.data.pipeline import Batch
from mmx.parallel.ops import Ops
from mmx.train.config import OptimizerConfig
from mmx.train.losses import TokenLoss, token_loss
from mmx.train.optimizer import make_optimizer

DATA_AXIS = "data"


class TrainState(NamedTuple):
    """params: flat dict, float32; opt: optimiser state; step: int32 updates done."""

    params: dict[str, jax.Array]
    opt: Any
    step: jax.Array


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """How one step is computed.

    dtype: activations (the parameters stay float32). accumulate: micro-batches per update.
    aux_coef: factor of the router load-balance loss. z_coef: factor of logsumexp², which keeps
    logits from drifting. remat: recompute blocks in the backward pass. num_sources: places in the
    mixture that losses are reported for. moe_capacity: each expert takes at most this multiple of
    its equal share of a micro-batch's tokens, over all devices; 0: no token is dropped.
    """

    dtype: str = "bfloat16"
    accumulate: int = 1
    aux_coef: float = 0.01
    z_coef: float = 0.0
    remat: bool = False
    num_sources: int = 1
    moe_capacity: float = 0.0


def data_mesh(devices=None) -> Mesh:
    """All devices along one axis that splits the batch."""
    return Mesh(np.asarray(devices if devices is not None else jax.devices()), (DATA_AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def put_batch(mesh: Mesh, batch: Batch) -> Batch:
    """Places this host's rows of a batch on its devices, split over the data axis."""
    sharding = NamedSharding(mesh, PartitionSpec(DATA_AXIS))
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(partial(jax.make_array_from_process_local_data, sharding), batch)


def init_state(params, optimizer: optax.GradientTransformation) -> TrainState:
    """A state before the first update; traceable, so it also serves as the abstract state."""
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def _loss(config: ModelConfig, how: StepConfig, params, batch: Batch,
          ops: Ops | None = None):
    """Sums of one micro-batch, the layers' load balance, and their mean share of dropped pairs."""
    ids_BT, targets_BT = batch.tokens_BS[:, :-1], batch.tokens_BS[:, 1:]
    x_BTD, aux = model.forward(config, params, ids_BT, starts_BT=batch.starts_BT,
                               dtype=how.dtype, remat=how.remat, hidden=True,
                               moe_capacity=how.moe_capacity, ops=ops)
    if ops is not None:
        # Gathered once; inside the loss's loop it would be for every chunk, and its gradient, too.
        params = {**params, "head/weight": ops.use(params["head/weight"], "vocab", "embed")}
    loss = token_loss(partial(model.logits_of, config, params), x_BTD, targets_BT,
                      batch.weights_BT, config.vocab_size)
    return loss, model.load_balance_by_layer(aux), jnp.mean(aux.dropped_L)


def _by_source(num_sources: int, source_B, loss: TokenLoss):
    """Per-source sums [num_sources] of plain nll, targets and right answers."""
    which_BK = jax.nn.one_hot(source_B, num_sources, dtype=jnp.float32)
    return {"nll": loss.plain_B @ which_BK, "targets": loss.targets_B @ which_BK,
            "right": loss.right_B @ which_BK}


def gradients(config: ModelConfig, how: StepConfig, params, batch: Batch,
              ops: Ops | None = None):
    """Mean loss over the batch's weighted targets, its gradients, and metrics.

    The micro-batches' sums are divided by the weight of the whole batch, so accumulation changes
    the memory and not the result (the load balance alone is a mean over micro-batches).
    """
    total_weight = jnp.maximum(jnp.sum(batch.weights_BT), 1e-9)

    def objective(params, micro: Batch):
        loss, balance, dropped = _loss(config, how, params, micro, ops)
        value = (jnp.sum(loss.nll_B) + how.z_coef * loss.z) / total_weight
        value = value + how.aux_coef * balance / how.accumulate
        metrics = {"loss": jnp.sum(loss.nll_B) / total_weight,
                   "balance": balance / how.accumulate,
                   **_by_source(how.num_sources, micro.source_B, loss)}
        if how.moe_capacity:
            metrics["dropped"] = dropped / how.accumulate
        return value, metrics

    grad = jax.grad(objective, has_aux=True)
    if how.accumulate == 1:
        return grad(params, batch)

    def one(carry, micro):
        return jax.tree.map(jnp.add, carry, grad(params, micro)), None

    # Rows i·A + a form micro-batch a: a batch split over devices stays where it is.
    micros = jax.tree.map(
        lambda x: x.reshape(-1, how.accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
    zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(
        lambda: grad(params, jax.tree.map(lambda x: x[0], micros))))
    return jax.lax.scan(one, zero, micros)[0]


@functools.lru_cache(maxsize=8)
def make_train_step(config: ModelConfig, rule: OptimizerConfig, how: StepConfig
                    ) -> Callable[[TrainState, Batch, float], tuple[TrainState, Mapping]]:
    """Returns the jitted update (state, batch, learning rate) -> (state, metrics).

    The state's buffers are reused.

    Metrics, float32 scalars unless said: loss (weighted mean nll in nats), balance, grad_norm
    (before clipping), dropped (share of (token, choice) pairs, where there is a capacity), and per
    source [num_sources]: nll, targets, right (sums).
    """

    optimizer = make_optimizer(rule)

    def update(state: TrainState, batch: Batch, rate):
        grads, metrics = gradients(config, how, state.params, batch)
        changes, opt = optimizer.update(grads, state.opt, state.params)
        squares = [jnp.sum(leaf * leaf) for leaf in jax.tree.leaves(grads)]
        metrics["grad_norm"] = jnp.sqrt(sum(squares))
        params = jax.tree.map(lambda leaf, change: leaf + rate * change, state.params, changes)
        return TrainState(params, opt, state.step + 1), metrics

    return jax.jit(update, donate_argnums=0)


@functools.lru_cache(maxsize=8)
def make_eval_step(config: ModelConfig, how: StepConfig) -> Callable[[Any, Batch], Mapping]:
    """Returns the jitted (params, batch) -> sums over the batch: nll, targets, right.

    No token is dropped, as in inference.
    """
    how = dataclasses.replace(how, moe_capacity=0.0)

    def evaluate(params, batch: Batch):
        loss = _loss(config, how, params, batch)[0]
        return {"nll": jnp.sum(loss.plain_B), "targets": jnp.sum(loss.targets_B),
                "right": jnp.sum(loss.right_B)}

    return jax.jit(evaluate)
