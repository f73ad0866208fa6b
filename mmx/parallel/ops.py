"""The operations of a layer whose form depends on where arrays lie, on one device."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from mmx.parallel.capacity import within
from pallas_kernels import attention, lightning_attention
from pallas_kernels.grouped_matmul.stacked import Stacked
from pallas_kernels.lightning_attention.decode import decodes_in_stack, lightning_decode_stacked

NO_CHOICE: Mapping[str, str] = {}


class Ops:
    """One device: each operation is its kernel. `MeshOps` has the same methods over a mesh.

    names: implementations of "lightning", "softmax", "moe"; automatic where absent.
    """

    def __init__(self, names: Mapping[str, str] = NO_CHOICE):
        self.names = names

    def constrain(self, x: jax.Array, *logical: str | None) -> jax.Array:
        """Says how an activation lies, by the logical axis of each dimension."""
        return x

    def between(self, x_BTD: jax.Array, inference: bool = False) -> jax.Array:
        """Says how the activations between two sums lie, which norms and residuals are made of."""
        return x_BTD

    def whole(self, x: jax.Array) -> jax.Array:
        """An activation that every device has all of."""
        return x

    def use(self, weight, *logical: str | None):
        """A parameter as the next product wants it: whole along a split `embed`, or as it lies."""
        return weight

    def shares_heads(self, inference: bool) -> bool:
        """Whether a norm over all heads is to be left to `project`, as it would be a sum more."""
        return False

    def project(self, product: Callable, spec: str, x, weight, logical, activation=None,
                inference: bool = False, rms: tuple[jax.Array, float] | None = None) -> jax.Array:
        """`product(spec, x, weight, None, activation)` with x [B, T, ...], `spec` as of einsum.

        `logical`: axes of the weight. `inference` allows what is not to be differentiated. `rms`:
        mean squares of heads [B, T, N], float32, and an epsilon; each token's product is divided by
        the root of their mean, where `shares_heads`.
        """
        return product(spec, x, weight, None, activation)

    def look_up(self, table: Callable, ids_BT: jax.Array) -> jax.Array:
        """`table(ids_BT)`: rows of a table whose words may lie apart."""
        return table(ids_BT)

    def cache_kv_heads(self, kv_heads: int) -> int:
        """Key/value heads that a cache holds: copies, where there are more devices than heads."""
        return kv_heads

    def lightning(self, q_BTNH, k_BTNH, v_BTNH, slopes_N, state_BNHH, starts_BT, lengths_B):
        """As `pallas_kernels.lightning_attention`.

        The state of a single token may be a `Stacked`, which is updated in place.
        """
        if isinstance(state_BNHH, Stacked):
            if starts_BT is not None:
                raise ValueError("A step's tokens begin no packed samples.")
            return lightning_decode_stacked(
                q_BTNH, k_BTNH, v_BTNH, slopes_N, state_BNHH, lengths_B)
        return lightning_attention(
            q_BTNH, k_BTNH, v_BTNH, slopes_N, state_BNHH, starts_BT=starts_BT,
            lengths_B=lengths_B, implementation=self.names.get("lightning"))

    def keeps_states(self, T: int, dtype, H: int) -> bool:
        """Whether `lightning` takes states inside the stack of all layers for T tokens a row."""
        return T == 1 and "lightning" not in self.names and decodes_in_stack(dtype, H)

    def attention(self, q_BTNH, k_BTKH, v_BTKH, samples_BT):
        """Attention among the given tokens."""
        return attention(q_BTNH, k_BTKH, v_BTKH, samples_BT=samples_BT,
                         implementation=self.names.get("softmax"))

    def cached_attention(self, q_BTNH, k_BTKH, v_BTKH, cache, offsets_B, lengths_B):
        """Writes keys and values at `offsets_B`; attends from there to all that is held.

        `q_BTNH` may have one token, each row's last. `cache` is (k, v) [B, K, S, H], each maybe a
        `Stacked`, which is written in place. Returns the output and the new cache.
        """
        cache = tuple(write_rows(old, new, offsets_B, lengths_B)
                      for old, new in zip(cache, (k_BTKH, v_BTKH), strict=True))
        k, v = (x.swapaxes(1, 2) for x in cache)
        first_B = first_query(q_BTNH, k_BTKH, offsets_B, lengths_B)
        out = attention(q_BTNH, k, v, offsets_B=first_B, implementation=self.names.get("softmax"))
        return out, cache

    def write_row(self, big, one, slot, tokens, *logical: str | None):
        """Row `slot` of a cache's leaf replaced by the only row of `one`, of the same capacity.

        Of keys and values the first `tokens` are copied at least.
        """
        return jax.lax.dynamic_update_slice_in_dim(
            big, one.astype(big.dtype), slot, logical.index("batch"))

    def grow(self, x, capacity: int, *logical: str | None):
        """Keys or values with empty slots behind theirs, `capacity` of them in all."""
        return pad_slots(x, capacity, logical.index("cache_time"))

    def experts(self, run: Callable, g_BTD, weight_BTk, expert_BTk, gate_up, down,
                inference: bool = False, capacity: float = 0.0) -> jax.Array:
        """Applies `run(g_TD, weight_Tk, expert_Tk, gate_up, down)` to all tokens: [B, T, D].

        `inference` allows what cannot be differentiated. Ids beyond the last expert are nobody's;
        with a `capacity` no expert has more pairs than `within_capacity` leaves it.
        """
        out_TD = run(*(x.reshape(-1, x.shape[-1]) for x in (g_BTD, weight_BTk, expert_BTk)),
                     gate_up, down)
        return out_TD.reshape(g_BTD.shape)

    def within_capacity(self, expert_BTk, valid_BT, num_experts: int,
                        capacity: float) -> jax.Array:
        """Returns bool [B, T, k]: pairs that are among their expert's first, in batch order.

        An expert takes ceil(capacity · k · valid tokens / num_experts).
        """
        return within(expert_BTk, valid_BT, num_experts, capacity)


def pad_slots(x, slots: int, axis: int) -> jax.Array:
    """Returns `x` with zeros behind, `slots` along `axis`."""
    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, slots - x.shape[axis])
    return jnp.pad(x, pads)


def first_query(q_BTNH, k_BTKH, offsets_B, lengths_B) -> jax.Array:
    """Returns the position of each row's first query: the last token's if there is only one."""
    if q_BTNH.shape[1] == k_BTKH.shape[1]:
        return offsets_B
    return offsets_B + jnp.maximum(lengths_B - 1, 0)


def write_rows(cache_BKSH, x_BTKH, offsets_B, lengths_B, stride: int = 1, phase=0):
    """Writes each row's first `lengths_B[b]` tokens at `offsets_B[b]`, and nothing else.

    Slot s holds the token at position `s · stride + phase`; tokens of other phases are left out.
    Of a `Stacked` the tokens go straight into the stack, and a `Stacked` is returned.
    """
    B, T = x_BTKH.shape[:2]
    S = cache_BKSH.shape[2]
    if T > S * stride:
        raise ValueError(
            f"{T} tokens do not fit a cache of {S * stride}; allocate at least the chunk.")
    x_BTKH = x_BTKH.astype(cache_BKSH.dtype)
    # Padding goes beyond the cache, where it is dropped. Nothing of the cache is read, so that a
    # donated one is updated in place.
    if B * T == 1:  # XLA makes a slice update of a single index, and copies the cache for it
        x_BTKH, T = jnp.pad(x_BTKH, ((0, 0), (0, 1), (0, 0), (0, 0))), 2
    time_T = jnp.arange(T)
    position_BT = offsets_B[:, None] + time_T
    mine_BT = time_T < lengths_B[:, None]
    if stride > 1:
        mine_BT &= position_BT % stride == phase
    index_BT = jnp.where(mine_BT, position_BT // stride, S + time_T)
    rows_B1 = jnp.arange(B)[:, None]
    how = {"mode": "drop", "unique_indices": True}
    if isinstance(cache_BKSH, Stacked):
        r = cache_BKSH.index
        return Stacked(cache_BKSH.whole.at[r, rows_B1, :, index_BT].set(x_BTKH, **how), r)
    return cache_BKSH.at[rows_B1, :, index_BT].set(x_BTKH, **how)
