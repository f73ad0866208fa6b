"""Matrices laid side by side, so that a CPU multiplies few tokens by one large one.

XLA's CPU backend reads a matrix [in, out] as it lies, at the speed of memory. A batch of one small
matrix per expert, or one stored [out, in], takes it 2 to 3 times as long; for a decode step of a
few tokens that is most of the time.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mmx.nn.params import Params

# A second copy of a model's matrices is made up to this size.
WIDE_BYTES = 1 << 30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Wide:
    """A parameter as one matrix [in, out]; under a stack with the repeats in front.

    `gate_up` is [D, E·2·F], `qkv` also has the gate's columns: [D, 4·N·H], the head is [D, V].
    """

    values: jax.Array

    def __getitem__(self, index):
        """Returns itself for `[...]`, the way modules read a parameter."""
        if index is not ...:
            raise TypeError("A Wide is indexed by [...] alone; index its values.")
        return self


def widen(params: Params) -> Params:
    """Returns `params` with copies of its matrices laid wide; itself if they are large or int8."""
    large = {path: leaf for path, leaf in params.items()
             if path == "head/weight" or path.endswith(("moe/gate_up", "attn/qkv", "attn/gate"))}
    plain = all(isinstance(leaf, jax.Array) for leaf in large.values())
    if not plain or sum(leaf.nbytes for leaf in large.values()) > WIDE_BYTES:
        return params
    return {**params, **_widen(large)}


@jax.jit
def _widen(large):
    wide = {}
    for path, leaf in large.items():
        if path == "head/weight":
            wide[path] = Wide(leaf.T)
        elif path.endswith("moe/gate_up"):
            R, _, E, D, F = leaf.shape
            wide[path] = Wide(leaf.transpose(0, 3, 2, 1, 4).reshape(R, D, E * 2 * F))
        elif path.endswith("attn/qkv"):
            R, D = leaf.shape[:2]
            gate = large[path.removesuffix("qkv") + "gate"]
            wide[path] = Wide(
                jnp.concatenate([leaf.reshape(R, D, -1), gate.reshape(R, D, -1)], axis=2))
    return wide
