"""Choice of implementation: automatic choices are logged once per shape, named ones are kept."""

import contextlib
import contextvars
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax

log = logging.getLogger("pallas_kernels")
_target: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)


def platform() -> str:
    """Returns "cpu", "tpu" or "gpu": what programs traced now will run on."""
    return _target.get() or jax.default_backend()


@contextlib.contextmanager
def compiling_for(name: str):
    """Traces programs for another platform than this process runs on (ahead-of-time use)."""
    token = _target.set(name)
    try:
        yield
    finally:
        _target.reset(token)


def choose(op: str, table: Mapping[str, Callable], name: str | None, default: str, shape: Any):
    """Returns the function called `name` in `table`, or the default's when `name` is None.

    Raises ValueError for a name that is not in the table: never another one in silence.
    """
    if name is None:
        _log_choice(op, default, str(shape))
        return table[default]
    if name not in table:
        raise ValueError(
            f"{op} has no implementation '{name}'. It has {', '.join(sorted(table))}. "
            "Pass one of them, or None for the automatic choice."
        )
    return table[name]


@functools.cache
def _log_choice(op: str, name: str, shape: str) -> None:
    log.info("%s%s runs as '%s'", op, shape, name)
