"""The operations of a layer over a device mesh: each runs as one program per device."""

import math
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mmx.errors import UserError
from mmx.parallel import experts, lasp, ring, rows, sums
from mmx.parallel.experts import leaf_spec
from mmx.parallel.ops import NO_CHOICE, Ops, first_query, pad_slots, write_rows
from mmx.sharding.rules import Rules, axes_of, check_axes, partition
from pallas_kernels import attention, lightning_attention, partial_attention
from pallas_kernels.grouped_matmul.stacked import Stacked, cut
from pallas_kernels.quantized import TurnedTensor


class MeshOps(Ops):
    """Operations over `mesh` by the table `rules`; arguments and results are whole arrays.

    Args:
      names: implementations as for `Ops`, and "sequence": how states travel between pieces of a
        sequence ("gather", "log", "ring"), "context": how keys do ("ring", "gather"), "dispatch":
        how tokens meet experts ("sum", "all_to_all", "ragged"; by traffic and platform if
        absent), "groups": in how many parts they do, "rows": which of them a device sends where
        others hold the same ("all", "part"), "router": whose capacity counts where there is one
        ("global", "local"), "sums": how devices get sums, at inference ("whole", "pieces",
        "narrow"; by platform and the number of tokens if absent).
    """

    def __init__(self, mesh: Mesh, rules: Rules, names: Mapping[str, str] = NO_CHOICE):
        super().__init__(names)
        check_axes(mesh.shape)
        self.mesh, self.rules = mesh, rules

    def spec(self, shape, *logical) -> P:
        return partition(self.rules, self.mesh, shape, logical)

    def sharding(self, shape, *logical) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(shape, *logical))

    def constrain(self, x, *logical):
        return jax.lax.with_sharding_constraint(x, self.sharding(x.shape, *logical))

    def between(self, x_BTD, inference=False):
        spec = self.spec(x_BTD.shape, "batch", "time", None)
        if inference and (pieces := self._pieces(x_BTD, spec, self._heads)[1]):
            spec = P(spec[0], pieces, None)
        return jax.lax.with_sharding_constraint(x_BTD, NamedSharding(self.mesh, spec))

    @property
    def _heads(self) -> tuple[str, ...]:
        return tuple(name for name in self.rules.heads if self.mesh.shape.get(name, 1) > 1)

    def whole(self, x):
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, P()))

    def use(self, weight, *logical):
        split = any(self.mesh.shape.get(name, 1) > 1 for name in self.rules.embed)
        if not split or self.rules.hidden:
            return weight
        whole = [None if name == "embed" else name for name in logical]
        if not _is_turned(weight):
            return jax.tree.map(lambda leaf: self.constrain(leaf, *whole), weight)
        weight = cut(weight)
        places = leaf_spec(weight, self.spec(weight.shape, *whole))
        return jax.tree.map(lambda leaf, spec: jax.lax.with_sharding_constraint(
            leaf, NamedSharding(self.mesh, spec)), weight, places)

    def shares_heads(self, inference):
        return inference and self._parts(self._heads) > 1

    def project(self, product, spec, x, weight, logical, activation=None, inference=False,
                rms=None):
        """A turned weight is each device's own product, as is a sum over devices that is made by
        pieces of time or has a norm behind it; others are left to the compiler."""
        weight = self.use(weight, *logical)
        inputs, output = spec.split("->")
        left, right = inputs.split(",")
        axis = dict(zip(right, logical, strict=True))
        lie = {letter: "hidden" if name == "embed" else name for letter, name in axis.items()}
        sizes = dict(zip(left + right, (*x.shape, *weight.shape), strict=True))
        x_spec, out_spec = (self.spec([sizes[letter] for letter in letters], "rows", "time",
                                      *(lie[letter] for letter in letters[2:]))
                            for letters in (left, output))
        if self.rules.embed and not self.rules.hidden:
            logical = [None if name == "embed" else name for name in logical]
        held = self.spec(weight.shape, *logical)
        over = tuple(name for letter, entry in zip(right, held, strict=True) if letter not in output
                     for name in experts.names_of(entry))
        form, pieces = self._pieces(x, x_spec, over) if inference else (sums.WHOLE, None)
        summed = out_spec if pieces is None else P(out_spec[0], pieces, *out_spec[2:])

        def run(x, weight, *values):
            if not over:
                return product(spec, x, weight, None, activation)
            out = product(spec, x, weight, jnp.float32, None)
            means = [mean_BTN.sum(2) / rms[0].shape[2] for mean_BTN in values]
            if pieces is None and means:
                # Joined here, XLA makes one program of it, and none to take the sum apart.
                both = jax.lax.psum(jnp.concatenate([out, means[0][..., None]], -1), over)
                out, means = both[..., :-1], [both[..., -1]]
            elif pieces is None:
                out = jax.lax.psum(out, over)
            else:
                out = sums.keep_piece(out, over, 1, x.dtype, form)
                means = [sums.keep_piece(y, over, 1, y.dtype, sums.PIECES) for y in means]
            for mean_BT in means:
                out = out * jax.lax.rsqrt(mean_BT + rms[1])[..., None]
            out = out.astype(x.dtype)
            return out if activation is None else activation(out)

        if pieces is None and rms is None and not _is_turned(weight):
            out = product(spec, x, weight, None, activation)
            return jax.lax.with_sharding_constraint(out, NamedSharding(self.mesh, out_spec))
        values = () if rms is None else rms[:1]
        in_specs = x_spec, leaf_spec(weight, held), *(P(*x_spec[:3]) for _ in values)
        return self._island(run, in_specs, summed)(x, weight, *values)

    def _pieces(self, x, x_spec, over):
        """How sums over the axes `over` are made, and the entry of time if by pieces of it."""
        time = experts.names_of(x_spec[1])
        B, T, *_ = x.shape
        form = sums.form(self, B * T // self._parts((*experts.names_of(x_spec[0]), *time)))
        if form == sums.WHOLE or not over or T % self._parts((*time, *over)):
            return sums.WHOLE, None
        return form, (*time, *over)

    def _parts(self, names) -> int:
        return math.prod(self.mesh.shape[name] for name in names)

    def look_up(self, table, ids_BT):
        """One id alone is looked up twice: XLA for GPUs makes it a slice of the table, and gathers
        the whole table for that (2.3 GiB a step on two).
        """
        if ids_BT.size > 1:
            return table(ids_BT)
        # Behind a barrier, as a slice of two rows would become a slice of the table.
        return jax.lax.optimization_barrier(table(jnp.concatenate([ids_BT, ids_BT])))[:1]

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
        if isinstance(state_BNHH, Stacked):
            state = Stacked(P(None, *state), P())
        axis = self._time(q_BTNH)
        if axis:
            kernel = partial(lasp.lightning_attention, axis=axis,
                             method=self.names.get("sequence", "gather"))
        else:
            kernel = lightning_attention

        def run(q, k, v, slopes_N, state, starts_BT, lengths_B):
            if isinstance(state, Stacked):
                return Ops.lightning(self, q, k, v, slopes_N, state, starts_BT, lengths_B)
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

        if isinstance(cache[0], Stacked):
            held = Stacked(P(None, *held), P())
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
        pieces = math.prod(self.mesh.shape[name] for name in experts.names_of(lie[axis]))
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
                inference: bool = False, capacity: float = 0.0):
        return experts.over_mesh(self, run, g_BTD, weight_BTk, expert_BTk, gate_up, down,
                                 inference, capacity)

    def within_capacity(self, expert_BTk, valid_BT, num_experts: int, capacity: float):
        return experts.within_capacity(self, expert_BTk, valid_BT, num_experts, capacity)


def _is_turned(weight) -> bool:
    return isinstance(weight.whole if isinstance(weight, Stacked) else weight, TurnedTensor)


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
