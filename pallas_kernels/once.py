"""Kernels as functions of a program, so that many calls of one make and compile it once."""

import functools
from collections.abc import Callable

import jax


def once(kernel: Callable) -> Callable:
    """Returns `kernel(shape, *arrays, interpret, **arrays)` as one function of the program.

    Traced anew for each call, a kernel gets another text each time, and XLA compiles each text.
    `shape` is static. Interpreted kernels stay as they are: their threads call jax, which must
    wait for them.
    """
    function = jax.jit(kernel, static_argnums=0, static_argnames="interpret")

    @functools.wraps(kernel)
    def call(shape, *arrays, interpret, **named):
        return (kernel if interpret else function)(shape, *arrays, interpret=interpret, **named)

    return call
