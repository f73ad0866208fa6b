"""What `mmx bench kernels` times: each operation at each shape, with its work and its programs."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmx.bench import arrays, floors
from mmx.bench.floors import Work
from mmx.bench.pods_lightning import Lightning
from mmx.bench.sides import one_device
from mmx.bench.timing import Run, dispatched, looped
from mmx.config import ModelConfig
from mmx.nn.lightning import decay_slopes
from pallas_kernels import (
    attention,
    grouped_matmul,
    lightning_attention,
    lightning_decode_slots,
)
from pallas_kernels.attention.api import BY_NAME
from pallas_kernels.grouped_matmul.api import grouped_swiglu
from pallas_kernels.grouped_matmul.stacked import Stacked

# Steps of one compiled loop over a decode step, which is shorter than its dispatch, and how many of
# them stand in a row in its body on an accelerator. A CPU's compiler would fuse those.
LOOP_STEPS, UNROLL = 32, 8
# How far outputs of two forms lie apart at most: twice what each may be off (`check.LIMITS`).
AGREE = {"float32": 2e-5, "bfloat16": 8e-3}
UNPACKED = "/whole"  # beside packed samples: the same tokens as one sample


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation at one shape.

    `prepare(seed)` draws the inputs and returns a function from the name of an implementation (None
    is the automatic choice) to what is timed. `op` is the function of `pallas_kernels` beneath.
    `own_choice`: it stands inside a model, which chooses. `also`: forms that are timed for this
    case alone.
    """

    operation: str
    op: str
    shape: str
    dims: Mapping[str, int]
    dtype: str
    work: Work
    prepare: Callable[[int], Callable[[str | None], Run]]
    also_unpacked: bool = False
    own_choice: bool = False
    also: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Shapes by operation: batch × tokens (× heads), packed samples, batches, rows, contexts."""

    forward: Sequence[tuple[int, ...]]
    train: Sequence[tuple[int, ...]]
    packed: Sequence[tuple[int, int]]            # samples, tokens
    step: Sequence[int]                          # batch
    grouped: Sequence[int]                       # rows
    attention: Sequence[tuple[int, int]]         # batch, tokens
    attention_step: Sequence[tuple[int, ...]]    # batch, context (, layers of a stack)
    context: Sequence[int]                       # tokens
    chunk: int                                   # of a context, in layers


FULL = Sizes(
    forward=((1, 8192), (8, 8192), (1, 131072), (1, 524288), (1, 131072, 8)),
    train=((1, 8192), (8, 8192), (1, 131072)), packed=((64, 131072),), step=(16, 64, 256),
    grouped=(4096, 32768), attention=((1, 8192), (1, 32768)),
    attention_step=((16, 8192), (64, 8192), (64, 8192, 3), (8, 65536, 2)),
    context=(4096, 16384, 65536, 262144, 1048576), chunk=16384)
SMALL = Sizes(
    forward=((1, 1024), (4, 1024), (1, 8192), (1, 8192, 2)), train=((1, 1024), (1, 4096)),
    packed=((8, 4096),), step=(1, 4, 16), grouped=(256, 2048), attention=((1, 512), (1, 2048)),
    attention_step=((4, 1024), (4, 1024, 3)), context=(512, 2048, 8192, 32768), chunk=1024)


def cases(config: ModelConfig, sizes: Sizes, dtype: str) -> list[Case]:
    """All cases at the widths of `config`, in the order of the table."""
    make = _Maker(config, dtype)
    return [
        *(make.forward("lightning_forward", *one) for one in sizes.forward),
        *(make.train(*one) for one in sizes.train),
        *(make.packed(*one) for one in sizes.packed),
        *(make.step(one) for one in sizes.step),
        *(make.slots(one) for one in sizes.step),
        *(make.grouped(kind, rows) for rows in sizes.grouped for kind in ("gate_up", "down")),
        *(make.attention(*one) for one in sizes.attention),
        *(make.attention_step(*one) for one in sizes.attention_step),
        *(make.forward("context", 1, tokens) for tokens in sizes.context),
        *(make.layers(tokens, min(sizes.chunk, tokens)) for tokens in sizes.context)]


def some_slopes(config: ModelConfig, layer: int, heads: int) -> jax.Array:
    """Slopes [heads] of a layer: evenly among its heads, as one device of several has them."""
    slopes_N = decay_slopes(config)[layer]
    return jnp.asarray(slopes_N[::len(slopes_N) // heads][:heads])


def starts_of(lengths: np.ndarray) -> jax.Array:
    """Bool [1, T], true where each of the samples of these lengths begins."""
    starts_T = np.zeros(int(np.sum(lengths)), bool)
    starts_T[np.cumsum(lengths) - lengths] = True
    return jnp.asarray(starts_T)[None]


def mixed_lengths(samples: int, tokens: int, seed: int) -> np.ndarray:
    """Sample lengths from short to long that sum to `tokens`, each at least 1."""
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.ones(samples))
    return 1 + rng.multinomial(tokens - samples, shares)


def skewed_groups(groups: int, rows: int, seed: int) -> np.ndarray:
    """Rows per group by a Dirichlet distribution of concentration 8, as routers are out of balance.
    """
    rng = np.random.default_rng(seed)
    return rng.multinomial(rows, rng.dirichlet(np.full(groups, 8.0))).astype(np.int32)


def _steps(step: Callable, state: jax.Array, *args: jax.Array) -> Run:
    unroll = 1 if jax.default_backend() == "cpu" else UNROLL
    return looped(step, state, LOOP_STEPS, *args, unroll=unroll)


class _Maker:
    """Cases of one geometry and dtype."""

    def __init__(self, config: ModelConfig, dtype: str):
        self.config, self.dtype = config, dtype
        self.size = jnp.dtype(dtype).itemsize

    def _draw(self, seed: int, **shapes: Sequence[int]) -> list[jax.Array]:
        return [arrays.values(arrays.named_key(seed, name), shape, self.dtype)
                for name, shape in shapes.items()]

    def forward(self, operation: str, B: int, T: int, N: int | None = None) -> Case:
        c = self.config
        heads, H = N or c.num_heads, c.head_dim

        def prepare(seed):
            q, k, v = self._draw(seed, **dict.fromkeys("qkv", (B, T, heads, H)))
            slopes = some_slopes(c, c.num_layers // 2, heads)
            return lambda name: dispatched(jax.jit(partial(
                lightning_attention, implementation=name)), q, k, v, slopes)

        shape = f"{B}x{T}" + (f"h{N}" if N else "")
        return Case(operation, "lightning_attention", shape,
                    {"batch": B, "tokens": T, "heads": heads, "head_dim": H}, self.dtype,
                    floors.lightning(B, T, heads, H, self.size), prepare)

    def layers(self, T: int, chunk: int) -> Case:
        """A period's lightning layers, with projections, norm and gate, read as the engine reads
        a prompt: chunk by chunk from the state before it."""
        c = self.config
        made = Lightning(c, one_device(), self.dtype)
        return Case("context_layers", "lightning_attention", f"1x{T}",
                    {"batch": 1, "tokens": T, "chunk": chunk, "layers": len(made.layers),
                     "heads": c.num_heads, "head_dim": c.head_dim}, self.dtype,
                    made.layers_work(T), lambda seed: lambda name: Lightning(
                        c, one_device(), self.dtype, seed).layers_run(T, chunk), own_choice=True)

    def train(self, B: int, T: int) -> Case:
        c = self.config
        N, H = c.num_heads, c.head_dim

        def prepare(seed):
            q, k, v, do = self._draw(seed, **dict.fromkeys(("q", "k", "v", "do"), (B, T, N, H)))
            slopes = some_slopes(c, c.num_layers // 2, N)

            def both(name, q, k, v, slopes, do):
                out, back = jax.vjp(lambda q, k, v: lightning_attention(
                    q, k, v, slopes, implementation=name)[0], q, k, v)
                return out, back(do)
            return lambda name: dispatched(jax.jit(partial(both, name)), q, k, v, slopes, do)

        return Case("lightning_train", "lightning_attention", f"{B}x{T}",
                    {"batch": B, "tokens": T, "heads": N, "head_dim": H}, self.dtype,
                    floors.lightning(B, T, N, H, self.size, train=True), prepare)

    def packed(self, samples: int, T: int) -> Case:
        c = self.config
        N, H = c.num_heads, c.head_dim

        def prepare(seed):
            q, k, v = self._draw(seed, **dict.fromkeys("qkv", (1, T, N, H)))
            slopes = some_slopes(c, c.num_layers // 2, N)
            starts = starts_of(mixed_lengths(samples, T, seed))

            def make(name):
                given = {"starts_BT": starts}
                if name and name.endswith(UNPACKED):
                    name, given = name.removesuffix(UNPACKED), {}
                name = None if name == "auto" else name
                return dispatched(jax.jit(lambda q, k, v, s, given: lightning_attention(
                    q, k, v, s, implementation=name, **given)), q, k, v, slopes, given)
            return make

        return Case("lightning_packed", "lightning_attention", f"{samples}in{T}",
                    {"batch": 1, "tokens": T, "samples": samples, "heads": N, "head_dim": H},
                    self.dtype, floors.lightning(1, T, N, H, self.size), prepare,
                    also_unpacked=True)

    def step(self, B: int) -> Case:
        c = self.config
        N, H = c.num_heads, c.head_dim

        def prepare(seed):
            q, k, v = self._draw(seed, **dict.fromkeys("qkv", (B, 1, N, H)))
            slopes = some_slopes(c, 0, N)

            def make(name):
                # Made anew for each: the loop keeps it in place, and its input is gone.
                state = arrays.values(arrays.named_key(seed, "state"), (B, N, H, H), jnp.float32)

                def step(state, q, k, v, slopes):
                    out, state = lightning_attention(q, k, v, slopes, state, implementation=name)
                    return state, out
                return _steps(step, state, q, k, v, slopes)
            return make

        return Case("lightning_decode", "lightning_attention", f"b{B}",
                    {"batch": B, "heads": N, "head_dim": H}, self.dtype,
                    floors.lightning_step(B, N, H), prepare)

    def slots(self, B: int) -> Case:
        """The step where the states lie in a pool of twice as many, in no order."""
        c = self.config
        N, H = c.num_heads, c.head_dim

        def prepare(seed):
            q, k, v = self._draw(seed, **dict.fromkeys("qkv", (B, N, H)))
            slopes = some_slopes(c, 0, N)
            slots_B = jnp.asarray(np.random.default_rng(seed).permutation(2 * B)[:B], jnp.int32)

            def make(name):
                pool = arrays.values(arrays.named_key(seed, "pool"), (2 * B, N, H, H), jnp.float32)

                def step(pool, q, k, v, slopes, slots_B):
                    out, pool = lightning_decode_slots(q, k, v, slopes, pool, slots_B,
                                                       implementation=name)
                    return pool, out
                return _steps(step, pool, q, k, v, slopes, slots_B)
            return make

        return Case("lightning_decode_slots", "lightning_decode_slots", f"b{B}",
                    {"batch": B, "pool": 2 * B, "heads": N, "head_dim": H}, self.dtype,
                    floors.lightning_step(B, N, H), prepare)

    def grouped(self, kind: str, M: int) -> Case:
        c = self.config
        E, (D, F) = c.num_experts, (c.hidden_size, c.expert_dim)
        D, F, matrices = (D, F, 2) if kind == "gate_up" else (F, D, 1)
        # The floor must not depend on the run's seed, nor the groups.
        sizes = skewed_groups(E, M, 0)

        def prepare(seed):
            key = partial(arrays.named_key, seed)
            (x,) = self._draw(seed, x=(M, D))
            shape = (E, D, F) if matrices == 1 else (matrices, E, D, F)
            w = arrays.values(key("w"), shape, self.dtype, scale=D**-0.5)
            product = grouped_matmul if matrices == 1 else grouped_swiglu
            return lambda name: dispatched(
                jax.jit(partial(product, implementation=name)), x, w, jnp.asarray(sizes))

        return Case(f"grouped_{kind}", "grouped_matmul", f"t{M}",
                    {"rows": M, "groups": E, "in": D, "out": F, "matrices": matrices,
                     "largest_group": int(sizes.max())},
                    self.dtype, floors.grouped(M, D, F, int(np.count_nonzero(sizes)), self.size,
                                               matrices), prepare)

    def attention(self, B: int, T: int) -> Case:
        c = self.config
        N, K, H = c.num_heads, c.num_kv_heads, c.head_dim

        def prepare(seed):
            q, k, v = self._draw(seed, q=(B, T, N, H), k=(B, T, K, H), v=(B, T, K, H))
            return lambda name: dispatched(
                jax.jit(partial(attention, implementation=name)), q, k, v)

        return Case("attention_prefill", "attention", f"{B}x{T}",
                    {"batch": B, "tokens": T, "heads": N, "kv_heads": K, "head_dim": H},
                    self.dtype, floors.attention(B, T, N, K, H, self.size), prepare)

    def attention_step(self, B: int, S: int, layers: int = 0) -> Case:
        """With `layers` keys and values lie in a stack of so many, as a scan over layers has them:
        a form reads one where it lies, or it is cut out first. There outputs are compared."""
        c = self.config
        N, K, H = c.num_heads, c.num_kv_heads, c.head_dim

        def prepare(seed):
            q, k, v = self._draw(seed, q=(B, 1, N, H), k=(B, S, K, H), v=(B, S, K, H))
            offsets_B = jnp.full((B,), S - 1, jnp.int32)

            def step(name: Any, q, k, v, offsets_B):
                return attention(q, k, v, offsets_B=offsets_B, implementation=name)
            return lambda name: dispatched(jax.jit(partial(step, name)), q, k, v, offsets_B)

        def prepare_stack(seed):
            q, k, v = self._draw(seed, q=(B, 1, N, H), **dict.fromkeys("kv", (layers, B, K, S, H)))
            args = q, k, v, S - 1 - jnp.arange(B) % 2, jnp.int32(layers // 2)

            def step(name: Any, q, k, v, offsets_B, layer):
                k, v = (Stacked(x, layer).swapaxes(1, 2) for x in (k, v))
                return attention(q, k, v, offsets_B=offsets_B, implementation=name)

            wanted = jax.jit(partial(step, "xla"))(*args)

            def make(name):
                program = jax.jit(partial(step, name))
                off = jnp.linalg.norm((program(*args) - wanted).astype(jnp.float32).ravel())
                off /= jnp.linalg.norm(wanted.astype(jnp.float32).ravel())
                if not off <= AGREE[self.dtype]:
                    raise ValueError(f"Its output is {off:.2g} off that of blocks in XLA.")
                return dispatched(program, *args)
            return make

        dims = {"batch": B, "context": S, "heads": N, "kv_heads": K, "head_dim": H}
        work = floors.attention_step(B, S, N, K, H, self.size)
        if layers:
            return Case("attention_decode", "attention", f"b{B}s{S}l{layers}",
                        dims | {"layers": layers}, self.dtype, work, prepare_stack, also=BY_NAME)
        return Case("attention_decode", "attention", f"b{B}s{S}", dims, self.dtype, work, prepare)
