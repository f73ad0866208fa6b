"""The operations of a layer over a device mesh: each runs as one program per device."""

import math
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mmx.errors import UserError
from mmx.parallel import lasp, ring, rows
from mmx.parallel.exchange import ROOM, all_to_all_experts
from mmx.parallel.ops import NO_CHOICE, Ops, first_query, pad_slots, write_rows
from mmx.sharding.rules import Rules, axes_of, check_mesh, partition
from pallas_kernels import attention, lightning_attention, partial_attention
from pallas_kernels.grouped_matmul.stacked import Stacked
from pallas_kernels.quantized import QuantizedTensor


class MeshOps(Ops):
    """Operations over `mesh` by the table `rules`; arguments and results are whole arrays.

    Args:
      names: implementations as for `Ops`, and "sequence": how states travel between pieces of a
        sequence ("gather", "log", "ring"), "context": how keys do ("ring", "gather"), "dispatch":
        how tokens meet experts ("sum", "all_to_all"; chosen by traffic if absent).
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
                                  method=self.names.get("context", "ring"),
                                  implementation=self.names.get("softmax"))

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
        the keys that it holds, and the shares are summed over the holders, each of which keeps its
        piece of time: what travels grows with the chunk, not with what the cache holds.
        """
        k_BTKH, v_BTKH = (self._copied_heads(x) for x in (k_BTKH, v_BTKH))
        q = self.spec(q_BTNH.shape, "batch", "time", "heads", None)
        new = self.spec(k_BTKH.shape, "batch", None, "kv_heads", None)
        held = self.spec(cache[0].shape, "batch", "kv_heads", "cache_time", None)
        used = axes_of(self.rules, self.mesh, "batch", q_BTNH.shape[0])
        holders = axes_of(self.rules, self.mesh, "cache_time", cache[0].shape[2], used)
        time = self._time(q_BTNH)
        W = math.prod(self.mesh.shape[name] for name in holders)

        def run(q, k, v, held, offsets_B, lengths_B):
            phase = jax.lax.axis_index(holders) if holders else 0
            held = tuple(write_rows(old, x, offsets_B, lengths_B, W, phase)
                         for old, x in zip(held, (k, v), strict=True))
            if time:
                q = jax.lax.all_gather(q, time, axis=1, tiled=True)
            first_B = first_query(q, k, offsets_B, lengths_B)
            # A chunk's own keys as the cache holds them, so that its split does not matter.
            own = tuple(x.astype(old.dtype) for x, old in zip((k, v), held, strict=True))
            kv = (x.swapaxes(1, 2) for x in held)
            form = self.names.get("softmax")
            if holders:
                sums = partial_attention(
                    q, *kv, offsets_B=first_B, stride=W, phase=phase, implementation=form,
                    own=own if q.shape[1] == k.shape[1] else None)
                out = merge(*sums, holders, time).astype(q.dtype)
            else:
                out = attention(q, *kv, offsets_B=first_B, implementation=form)
                out = _own_piece(out, time)
            return out, held

        in_specs = (q, new, new, (held, held), P(q[0]), P(q[0]))
        return self._island(run, in_specs, (q, (held, held)))(
            q_BTNH, k_BTKH, v_BTKH, cache, offsets_B, lengths_B)

    def write_row(self, big, one, slot, tokens, *logical):
        """Also where one row lies otherwise than many: see `mmx.parallel.rows`."""
        axis = logical.index("batch")
        owners = axes_of(self.rules, self.mesh, "batch", big.shape[axis])
        time, holders = None, ()
        if "cache_time" in logical:
            time = logical.index("cache_time")
            holders = axes_of(self.rules, self.mesh, "cache_time", one.shape[time])
            if any(name not in holders for name in owners):
                raise ValueError(f"{one.shape[time]} slots do not lie over the mesh; round them up "
                                 f"to a multiple of {self.cache_pieces}.")
        body = partial(rows.write, axis=axis, time=time, owners=owners, holders=holders)
        lie = self.spec(big.shape, *logical)
        return self._island(body, (lie, self.spec(one.shape, *logical), P(), P()), lie)(
            big, one, slot, tokens)

    def grow(self, x, capacity, *logical):
        """Round-robin slots stay where they are: each device adds its own."""
        axis, lie = logical.index("cache_time"), self.spec(x.shape, *logical)
        pieces = math.prod(self.mesh.shape[name] for name in _names(lie[axis]))
        if self.spec((*x.shape[:axis], capacity, *x.shape[axis + 1:]), *logical) != lie:
            raise ValueError(f"{capacity} slots do not lie as {x.shape[axis]} do.")
        return self._island(lambda x: pad_slots(x, capacity // pieces, axis), (lie,), lie)(x)

    @property
    def cache_pieces(self) -> int:
        """Devices over which one row's keys lie; a cache's capacity is a multiple of it."""
        return math.prod(self.mesh.shape.get(name, 1) for name in self.rules.cache_time)

    def time_pieces(self, T: int) -> int:
        """Devices over which the time of one row's chunk of T tokens lies."""
        return math.prod(self.mesh.shape[name]
                         for name in axes_of(self.rules, self.mesh, "time", T))

    def experts(self, run: Callable, g_BTD, weight_BTk, expert_BTk, gate_up, down,
                inference: bool = False):
        """By "sum" every device of the expert axis sees its group's tokens and adds its experts'
        part; by "all_to_all" tokens that lie over that axis are sent to their experts and back.

        The expert ids that `run` is given count from the device's first; ids outside are others'.
        "all_to_all" cannot be differentiated.
        """
        E = down.shape[0]
        owners = axes_of(self.rules, self.mesh, "expert", E)
        width = axes_of(self.rules, self.mesh, "mlp", down.shape[1], owners)
        # Tokens are whole along the axes over which experts lie.
        shared = (*owners, *width)
        tokens = self.spec(g_BTD.shape, "batch", "time", None)
        apart = P(*(_without(entry, shared) for entry in tokens))
        local_E = E // math.prod(self.mesh.shape[name] for name in owners)

        def body(g, weight, expert, gate_up, down):
            if owners:
                expert = expert - jax.lax.axis_index(owners) * local_E
                mine = (expert >= 0) & (expert < local_E)
                # An id of nobody's sorts behind all groups and selects no row.
                weight, expert = jnp.where(mine, weight, 0.0), jnp.where(mine, expert, local_E)
            out = Ops.experts(self, run, g, weight, expert, gate_up, down)
            return jax.lax.psum(out, shared) if shared else out

        def exchanged(g, weight, expert, gate_up, down):
            flat = (x.reshape(-1, x.shape[-1]) for x in (g, weight, expert))
            out = all_to_all_experts(
                lambda *tokens: run(*tokens, gate_up, down), *flat, local_E, owners,
                tuple(self.mesh.axis_names))
            out = jax.lax.psum(out.astype(g.dtype), width) if width else out
            return out.reshape(g.shape)

        entry = _entry(owners), _entry(width)
        weights = (_leaf_spec(gate_up, P(None, entry[0], None, entry[1])),
                   _leaf_spec(down, P(entry[0], entry[1], None)))
        spread = [name for part in tokens for name in _names(part)]
        method = self._dispatch(owners, spread, expert_BTk.shape[-1], inference)
        lie, island = (tokens, exchanged) if method == "all_to_all" else (apart, body)
        return self._island(island, (lie, lie, lie, *weights), lie)(
            g_BTD, weight_BTk, expert_BTk, gate_up, down)

    def _dispatch(self, owners, spread, k: int, inference: bool) -> str:
        possible = bool(owners) and all(name in spread for name in owners)
        method = self.names.get("dispatch")
        if method is None:
            # Rows that travel for a token: there and back, against all of the group's.
            parts = math.prod(self.mesh.shape[name] for name in owners)
            return "all_to_all" if possible and inference and parts > ROOM * k else "sum"
        if method not in ("sum", "all_to_all"):
            raise ValueError(f"dispatch='{method}' is not one of 'sum', 'all_to_all'.")
        return method if possible else "sum"


def merge(weighted, total, peak, axes, time=()) -> jax.Array:
    """Returns the attention [B, T, N, H] of shares that lie over mesh `axes`, float32.

    Of the tokens each device returns its piece over the mesh axes `time`, the first one slowest.
    """
    if axes:
        most = jax.lax.pmax(peak, axes)
        scale = jnp.exp(peak - most)
        sums = weighted * scale[..., None], total * scale
        for name in time:  # a sum of which a device keeps its piece is half of one for all
            if name in axes:
                sums = tuple(jax.lax.psum_scatter(x, name, scatter_dimension=1, tiled=True)
                             for x in sums)
            else:
                sums = tuple(_own_piece(x, (name,)) for x in sums)
        rest = tuple(name for name in axes if name not in time)
        weighted, total = jax.lax.psum(sums, rest) if rest else sums
    return weighted / total[..., None]


def _own_piece(x_BT, time):
    """This device's piece of the tokens over the mesh axes `time`, the first one slowest."""
    if not time:
        return x_BT
    piece = x_BT.shape[1] // jax.lax.axis_size(time)
    return jax.lax.dynamic_slice_in_dim(x_BT, jax.lax.axis_index(time) * piece, piece, axis=1)


def _entry(axes):
    return axes if len(axes) > 1 else axes[0] if axes else None


def _names(entry) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else entry


def _without(entry, names):
    return _entry(tuple(name for name in _names(entry) if name not in names))


def _leaf_spec(leaf, spec: P):
    """The spec of a plain leaf, of an int8 leaf's values and scale, or of such inside a stack.

    A scale is whole along the axes where it is 1.
    """
    if isinstance(leaf, Stacked):
        return Stacked(_leaf_spec(leaf.whole, P(None, *spec)), P())
    if not isinstance(leaf, QuantizedTensor):
        return spec
    scale = P(*(None if size == 1 else entry
                for size, entry in zip(leaf.scale.shape, spec, strict=True)))
    return QuantizedTensor(spec, scale)
