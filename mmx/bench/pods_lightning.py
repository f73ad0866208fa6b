"""Lightning attention alone over one device or several: the operation, and layers of it."""

from collections.abc import Callable
from functools import cached_property

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mmx.bench import floors, full_arrays
from mmx.bench.arrays import named_key
from mmx.bench.floors import Work
from mmx.bench.sides import mesh_name
from mmx.bench.timing import Run, loop, looped
from mmx.config import LIGHTNING, ModelConfig, deepnorm_beta
from mmx.model import param_specs
from mmx.nn.lightning import LightningAttention, decay_slopes
from mmx.nn.params import Factory, initial_kind
from mmx.nn.tokens import Tokens
from mmx.parallel.mesh_ops import MeshOps
from mmx.parallel.ops import Ops
from mmx.sharding.rules import LONG, param_shardings

# Of the operation, in one program.
CALLS = 4


class Lightning:
    """Lightning attention of a geometry, time over the axis `sequence` of `mesh`."""

    def __init__(self, config: ModelConfig, mesh: Mesh, dtype: str, seed: int = 0):
        self.config, self.mesh, self.dtype, self.seed = config, mesh, dtype, seed
        self.places = MeshOps(mesh, LONG)
        # A mesh of one device is the kernel without a mesh.
        self.ops = self.places if mesh.size > 1 else Ops()
        pattern = config.stacks[0].pattern
        self.layers = [p for p, kind in enumerate(pattern) if kind == LIGHTNING]

    @property
    def name(self) -> str:
        return mesh_name(self.mesh)

    @property
    def _state_shape(self) -> tuple[int, ...]:
        N, H = self.config.num_heads, self.config.head_dim
        return 1, N, H, H

    def operation(self, state, q, k, v):
        """(state, out) with the decays of the middle layer."""
        slopes_N = jnp.asarray(decay_slopes(self.config)[self.layers[len(self.layers) // 2]])
        out, state = self.ops.lightning(q, k, v, slopes_N, state, None, None)
        return state, out

    @cached_property
    def operation_program(self) -> Callable:
        """The jitted loop of `operation`: (state, out, q, k, v), the first two given up.

        In a model it is one operation of many: what a host needs to start several devices and to
        hear that they have ended is no part of it.
        """
        return loop(self.operation, CALLS)

    def operation_shapes(self, tokens: int) -> tuple:
        """Arguments of its program, abstract."""
        x = (1, tokens, self.config.num_heads, self.config.head_dim)
        x = jax.ShapeDtypeStruct(x, self.dtype, sharding=self.places.sharding(
            x, "batch", "time", "heads", None))
        state = jax.ShapeDtypeStruct(self._state_shape, jnp.float32, sharding=self.places.sharding(
            self._state_shape, "batch", "heads", None, None))
        return state, x, x, x, x

    def operation_run(self, tokens: int) -> Run:
        """The operation on random q, k and v over `tokens`."""
        state, out, *qkv = self.operation_shapes(tokens)
        drawn = [full_arrays.values(named_key(self.seed, name), leaf.shape, leaf.dtype,
                                    leaf.sharding) for name, leaf in zip("qkv", qkv, strict=True)]
        state, out = (full_arrays.values(named_key(self.seed, name), leaf.shape, leaf.dtype,
                                         leaf.sharding, "zeros")
                      for name, leaf in (("state", state), ("out", out)))
        return looped(self.operation, state, CALLS, *drawn, program=self.operation_program,
                      out=out)

    @cached_property
    def layers_program(self) -> Callable:
        """The jitted chain of a period's lightning layers on a chunk: (params, states, x).

        Projections, decayed state, norm, gate and output, each summed onto its input; no experts.
        """
        slopes_LN, gain = decay_slopes(self.config), deepnorm_beta(self.config.num_layers)
        tokens = Tokens(None, None, None, None, None, None)

        def run(params, states, x_BTD):
            new = []
            for p, state in zip(self.layers, states, strict=True):
                make = Factory(lambda spec: params[spec.path][0], "float32", f"stack/0/{p}/attn/")
                out, state = LightningAttention(self.config, make, gain)(
                    x_BTD, jnp.asarray(slopes_LN[p]), state, tokens, self.ops)
                x_BTD = x_BTD + out
                new.append(state)
            return new, self.ops.constrain(x_BTD, "batch", "time", None)
        return jax.jit(run, donate_argnums=1)

    def layers_shapes(self, chunk: int) -> tuple:
        """Its arguments, abstract; the parameters are those of the model, by path."""
        specs = {path: spec for path, spec in param_specs(self.config, self.dtype).items()
                 if any(path.startswith(f"stack/0/{p}/attn/") for p in self.layers)}
        places = param_shardings(specs, self.mesh, LONG)
        params = {path: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=places[path])
                  for path, spec in specs.items()}
        state, *_ = self.operation_shapes(chunk)
        x = (1, chunk, self.config.hidden_size)
        return params, [state] * len(self.layers), jax.ShapeDtypeStruct(
            x, self.dtype, sharding=self.places.sharding(x, "batch", "time", None))

    def layers_run(self, tokens: int, chunk: int) -> Run:
        """The layers over `tokens` in chunks, states handed on; every chunk is the same input."""
        shapes, states, x = self.layers_shapes(chunk)
        specs, program = param_specs(self.config, self.dtype), self.layers_program
        params = {}
        for path, leaf in shapes.items():
            kind, scale = initial_kind(specs[path])
            params[path] = full_arrays.values(named_key(self.seed, path), leaf.shape, leaf.dtype,
                                              leaf.sharding, kind, scale)
        x_BTD = full_arrays.values(named_key(self.seed, "x"), x.shape, x.dtype, x.sharding)

        zeros = jax.jit(lambda: [jnp.zeros(one.shape, one.dtype) for one in states],
                        out_shardings=[one.sharding for one in states])
        each = jax.default_backend() == "cpu"

        def call(count):
            held = out = None
            for _ in range(count):
                held = zeros()
                for _ in range(-(-tokens // chunk)):
                    out = None  # freed before the next is made
                    held, out = program(params, held, x_BTD)
                    if each:
                        jax.block_until_ready(out)
            jax.block_until_ready((held, out))
        return Run(call)

    def operation_work(self, tokens: int) -> Work:
        N, H = self.config.num_heads, self.config.head_dim
        return floors.lightning(1, tokens, N, H, jnp.dtype(self.dtype).itemsize)

    def layers_work(self, tokens: int) -> Work:
        """Five projections and the operation of each layer."""
        D, N, H = self.config.hidden_size, self.config.num_heads, self.config.head_dim
        L = len(self.layers)
        return Work(flops=L * tokens * (10 * D * N * H + 4 * N * H * H),
                    flops_formula=f"{L}·{tokens}·(2·5·{D}·{N}·{H} + 4·{N}·{H}²)")
