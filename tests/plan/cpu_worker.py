"""Compiles programs for eight simulated devices and prints what `mmx.plan.hlo` reads from them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mmx.plan import hlo, roofline
from mmx.plan.pods import CHIPS

MESH = Mesh(np.array(jax.devices()).reshape(2, 4), ("expert", "tensor"),
            axis_types=(AxisType.Auto,) * 2)
LAYERS, ROWS, WIDTH = 5, 16, 64


def aval(shape, *spec, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(MESH, P(*spec)))


def mapped(function):
    spec = P("expert", "tensor")
    return jax.shard_map(function, mesh=MESH, in_specs=spec, out_specs=spec, check_vma=False)


def repeat(function, times):
    return lambda x: jax.lax.scan(lambda carry, _: (function(carry), None), x, length=times)[0]


X = aval((ROWS, WIDTH), "expert", "tensor")
RING = [(i, (i + 1) % 4) for i in range(4)]
BACK = [(i, (i + 2) % 4) for i in range(4)]
# Each body keeps its shape, so that it can be repeated; a sine keeps neighbours from merging.
BODIES = {
    "all-reduce": lambda x: jnp.sin(jax.lax.psum(x, "tensor")),
    "all-reduce both": lambda x: jnp.sin(jax.lax.psum(x, ("expert", "tensor"))),
    "all-gather": lambda x: jnp.sin(jax.lax.all_gather(
        x, "tensor", axis=1, tiled=True)).reshape(4, *x.shape).sum(0),
    "reduce-scatter": lambda x: jnp.sin(jax.lax.psum_scatter(
        jnp.tile(x, (1, 4)), "tensor", scatter_dimension=1, tiled=True)),
    "all-to-all": lambda x: jnp.sin(jax.lax.all_to_all(
        x, "expert", 0, 1, tiled=True)).reshape(x.shape),
    "collective-permute": lambda x: jnp.sin(jax.lax.ppermute(x, "tensor", RING)),
    "collective-permute 2": lambda x: jnp.sin(jax.lax.ppermute(x, "tensor", BACK)),
}


def programs():
    for name, body in BODIES.items():
        yield name, mapped(repeat(body, LAYERS)), (X,)
    psum = BODIES["all-reduce"]
    yield "nested", mapped(repeat(lambda x: jnp.cos(repeat(psum, 4)(x)), 3)), (X,)
    yield "once", mapped(psum), (X,)
    yield "search", mapped(lambda x: jax.lax.while_loop(
        lambda c: jnp.sum(c) > 1, BODIES["all-gather"], x)), (X,)

    def layers(x_TD, weights):
        def layer(x_TD, w):
            up_DF, down_FD = w
            return x_TD + jnp.tanh(x_TD @ up_DF) @ down_FD, None
        return jax.lax.scan(layer, x_TD, weights)[0]

    weights = (aval((LAYERS, WIDTH, 4 * WIDTH), None, None, "tensor"),
               aval((LAYERS, 4 * WIDTH, WIDTH), None, "tensor"))
    yield "layers", layers, (aval((ROWS, WIDTH), "expert"), weights)
    # A large matrix beside few rows: its bytes are nearly all that moves.
    heavy = (aval((LAYERS, 512, 512)), aval((LAYERS, 512, 512)))
    yield "weights", layers, (aval((8, 512)), heavy)
    yield "branches", lambda flag, a, b: jax.lax.cond(
        flag, lambda a, b: a @ b, lambda a, b: (a @ b) @ b, a, b), (
            aval((), dtype=jnp.bool_), aval((32, 64)), aval((64, 64)))


def main():
    report = {}
    for name, function, avals in programs():
        text = jax.jit(function).lower(*avals).compile().as_text()
        found = hlo.collectives(text, MESH)
        reckoned = roofline.estimate(hlo.dots_by_type(text), hlo.bytes_accessed(text), found,
                                     CHIPS["v5e"], MESH)
        report[name] = {"collectives": [dataclasses.asdict(one) for one in found],
                        "flops": hlo.dots(text), "bytes": hlo.bytes_accessed(text),
                        "open": hlo.open_loops(text), "network": reckoned.network_s}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
