"""Messages between the ranks of one or several mesh axes, inside `jax.shard_map`."""

from collections.abc import Iterable

import jax
import numpy as np


def permute(tree, axis: str | tuple[str, ...], hops: Iterable[tuple[int, int]]):
    """`jax.lax.ppermute` of a tree, with ranks as `jax.lax.axis_index(axis)` counts them.

    ppermute counts along the mesh's order of axes whatever order `axis` names them in.
    """
    if not isinstance(axis, str):
        order = jax.sharding.get_abstract_mesh().axis_names
        ranks = np.arange(jax.lax.axis_size(axis)).reshape([jax.lax.axis_size(x) for x in axis])
        by_mesh = sorted(range(len(axis)), key=lambda i: order.index(axis[i]))
        place = np.argsort(ranks.transpose(by_mesh).ravel()).tolist()
        axis = tuple(axis[i] for i in by_mesh)
        hops = [(place[source], place[target]) for source, target in hops]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, hops), tree)
