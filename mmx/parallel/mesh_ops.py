"""The operations of a layer over a device mesh: each runs as one program per device."""

import math
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mmx.errors import UserError
from mmx.parallel import experts, lasp, ring
from mmx.parallel.ops import NO_CHOICE, Ops, first_query, write_rows
from mmx.sharding.rules import Rules, axes_of, check_mesh, partition
from pallas_kernels import lightning_attention, partial_attention


class MeshOps(Ops):
    """Operations over `mesh` by the table `rules`; arguments and results are whole arrays.

    Args:
      names: implementations as for `Ops`, and "sequence": how states travel between pieces of a
        sequence ("gather", "log", "ring"), "context": how keys do ("ring", "gather"), "dispatch":
        how tokens meet experts ("sum", "all_to_all", "ragged"; by traffic and platform if
        absent), "groups": in how many parts they do, "rows": which of them a device sends where
        others hold the same ("all", "part"), "router": whose capacity counts where there is one
        ("global", "local").
    """

    def __init__(self, mesh: Mesh, rules: Rules, names: Mapping[str, str] = NO_CHOICE):
        super().__init__(names)
        check_mesh(mesh)
        self.mesh, self.rules = mesh, rules

    def spec(self, shape, *logical) -> P:
        return partition(self.rules, self.mesh, shape, logical)

    def sharding(self, shape, *logical) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(shape, *logical))

    def constrain(self, x, *logical):
        return jax.lax.with_sharding_constraint(x, self.sharding(x.shape, *logical))

    def whole(self, x):
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, P()))

    def use(self, weight, *logical):
        if not self.rules.embed or self.rules.hidden:
            return weight
        whole = [None if name == "embed" else name for name in logical]
        return jax.tree.map(lambda leaf: self.constrain(leaf, *whole), weight)

    def cache_kv_heads(self, kv_heads: int) -> int:
        parts = math.prod(self.mesh.shape.get(name, 1) for name in self.rules.heads)
        if kv_heads % parts == 0:
            return kv_heads
        if parts % kv_heads:
            raise UserError(
                f"{kv_heads} key/value heads do not lie over {parts} devices.",
                "One of the two numbers must divide the other.",
                f"Make '{','.join(self.rules.heads)}' a divisor or a multiple of {kv_heads}.")
        return parts

    def _island(self, function, in_specs, out_specs):
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs,
                             check_vma=False)

    def _time(self, x) -> tuple[str, ...]:
        used = axes_of(self.rules, self.mesh, "batch", x.shape[0])
        return axes_of(self.rules, self.mesh, "time", x.shape[1], used)

    def lightning(self, q_BTNH, k_BTNH, v_BTNH, slopes_N, state_BNHH, starts_BT, lengths_B):
        x = self.spec(q_BTNH.shape, "batch", "time", "heads", None)
        state = self.spec(state_BNHH.shape, "batch", "heads", None, None)
        axis = self._time(q_BTNH)
        if axis:
            kernel = partial(lasp.lightning_attention, axis=axis,
                             method=self.names.get("sequence", "gather"))
        else:
            kernel = lightning_attention

        def run(q, k, v, slopes_N, state, starts_BT, lengths_B):
            return kernel(q, k, v, slopes_N, state, starts_BT=starts_BT, lengths_B=lengths_B,
                          implementation=self.names.get("lightning"))

        in_specs = (x, x, x, P(x[2]), state, P(x[0], x[1]), P(x[0]))
        return self._island(run, in_specs, (x, state))(
            q_BTNH, k_BTNH, v_BTNH, slopes_N, state_BNHH, starts_BT, lengths_B)

    def attention(self, q_BTNH, k_BTKH, v_BTKH, samples_BT):
        k_BTKH, v_BTKH = (self._copied_heads(x) for x in (k_BTKH, v_BTKH))
        q = self.spec(q_BTNH.shape, "batch", "time", "heads", None)
        kv = self.spec(k_BTKH.shape, "batch", "time", "kv_heads", None)
        axis = self._time(q_BTNH)

        def run(q, k, v, samples_BT):
            if not axis:
                return Ops.attention(self, q, k, v, samples_BT)
            return ring.attention(q, k, v, axis=axis, samples_BT=samples_BT,
                                  method=self.names.get("context", "ring"))

        return self._island(run, (q, kv, kv, P(q[0], q[1])), q)(
            q_BTNH, k_BTKH, v_BTKH, samples_BT)

    def _copied_heads(self, x_BTKH):
        """Each key/value head once per device that reads it, where devices outnumber heads."""
        K = x_BTKH.shape[2]
        copies = self.cache_kv_heads(K) // K
        return jnp.repeat(x_BTKH, copies, axis=2) if copies > 1 else x_BTKH

    def cached_attention(self, q_BTNH, k_BTKH, v_BTKH, cache, offsets_B, lengths_B):
        """A cache's slots lie round-robin over `cache_time`: position p on device p mod W.

        So the keys of any prefix are spread evenly. Queries are gathered, each device attends to
        the keys that it holds, and the shares are merged: what travels grows with the chunk, not
        with what the cache holds.
        """
        k_BTKH, v_BTKH = (self._copied_heads(x) for x in (k_BTKH, v_BTKH))
        q = self.spec(q_BTNH.shape, "batch", "time", "heads", None)
        new = self.spec(k_BTKH.shape, "batch", None, "kv_heads", None)
        held = self.spec(cache[0].shape, "batch", "kv_heads", "cache_time", None)
        used = axes_of(self.rules, self.mesh, "batch", q_BTNH.shape[0])
        holders = axes_of(self.rules, self.mesh, "cache_time", cache[0].shape[2], used)
        time = self._time(q_BTNH)
        W = math.prod(self.mesh.shape[name] for name in holders)
        T = q_BTNH.shape[1]

        def run(q, k, v, held, offsets_B, lengths_B):
            phase = jax.lax.axis_index(holders) if holders else 0
            held = tuple(write_rows(old, x, offsets_B, lengths_B, W, phase)
                         for old, x in zip(held, (k, v), strict=True))
            if time:
                q = jax.lax.all_gather(q, time, axis=1, tiled=True)
            first_B = first_query(q, k, offsets_B, lengths_B)
            k, v = (x.swapaxes(1, 2).astype(q.dtype) for x in held)
            sums = partial_attention(q, k, v, offsets_B=first_B, stride=W, phase=phase)
            out = merge(*sums, holders).astype(q.dtype)
            if time:
                piece = T // math.prod(self.mesh.shape[name] for name in time)
                out = jax.lax.dynamic_slice_in_dim(
                    out, jax.lax.axis_index(time) * piece, piece, axis=1)
            return out, held

        in_specs = (q, new, new, (held, held), P(q[0]), P(q[0]))
        return self._island(run, in_specs, (q, (held, held)))(
            q_BTNH, k_BTKH, v_BTKH, cache, offsets_B, lengths_B)

    def experts(self, run: Callable, g_BTD, weight_BTk, expert_BTk, gate_up, down,
                inference: bool = False, capacity: float = 0.0):
        return experts.over_mesh(self, run, g_BTD, weight_BTk, expert_BTk, gate_up, down,
                                 inference, capacity)

    def within_capacity(self, expert_BTk, valid_BT, num_experts: int, capacity: float):
        return experts.within_capacity(self, expert_BTk, valid_BT, num_experts, capacity)


def merge(weighted, total, peak, axes) -> jax.Array:
    """Returns the attention [B, T, N, H] of shares that lie over mesh `axes`, float32."""
    if axes:
        most = jax.lax.pmax(peak, axes)
        scale = jnp.exp(peak - most)
        weighted, total = jax.lax.psum((weighted * scale[..., None], total * scale), axes)
    return weighted / total[..., None]
