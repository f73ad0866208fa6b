"""Timing: warm up first, inner loops long enough for the clock, implementations in turns, medians.
"""

import dataclasses
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax

# Once an implementation has taken this long in all, it gets no further round.
LIMIT_S = 60.0


@dataclasses.dataclass(frozen=True)
class Run:
    """Something to time: `call(n)` performs it n times and returns when the device is done.

    One performance is `steps` steps, and times are told per step.
    """

    call: Callable[[int], None]
    steps: int = 1


@dataclasses.dataclass(frozen=True)
class Method:
    """How to time: rounds, and the least seconds between two readings of the clock."""

    rounds: int = 5
    at_least_s: float = 0.05


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds per step, a figure for each round; `inner` steps lie between two readings."""

    seconds: tuple[float, ...]
    inner: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """(longest - shortest) / median."""
        return (max(self.seconds) - min(self.seconds)) / self.median


def in_turns(runs: Mapping[str, Callable[[], Run]], method: Method,
             clock: Callable[[], float] = time.perf_counter, until: float = math.inf
             ) -> dict[str, Timing | str]:
    """Times what each of `runs` makes; a failure gives its first sentence in place of a Timing.

    Each is made and performed twice before the clock counts (compilation, first touch). Then every
    round performs each once, starting one further along each time, so that a drift of the machine's
    speed reaches all alike. After the first no round begins once the clock reads `until`.
    """
    made: dict[str, tuple[Run, int]] = {}
    found: dict[str, list[float]] = {name: [] for name in runs}
    failed: dict[str, str] = {}
    spent = dict.fromkeys(runs, 0.0)
    for name, make in runs.items():
        try:
            run = make()
            run.call(1)
            made[name] = run, _repeats(run, method, clock)
        except Exception as error:
            failed[name] = first_sentence(error)
    for round_ in range(method.rounds):
        if round_ and clock() > until:
            break
        names = list(made)
        shift = round_ % max(len(names), 1)
        for name in names[shift:] + names[:shift]:
            if spent[name] > LIMIT_S:
                continue
            run, count = made[name]
            try:
                begin = clock()
                run.call(count)
                took = clock() - begin
            except Exception as error:
                failed[name] = first_sentence(error)
                del made[name]
                continue
            spent[name] += took
            found[name].append(took / (count * run.steps))
    return {name: failed[name] if name in failed else
            Timing(tuple(found[name]), made[name][1] * made[name][0].steps) for name in runs}


def _repeats(run: Run, method: Method, clock) -> int:
    """Performances that together take at least `method.at_least_s`."""
    count = 1
    while True:
        begin = clock()
        run.call(count)
        took = clock() - begin
        if took >= method.at_least_s:
            return count
        # Aim a little beyond, at most tenfold at once: a first figure may be mostly overhead.
        count = min(10 * count, math.ceil(1.2 * count * method.at_least_s / max(took, 1e-9)))


def first_sentence(error: BaseException) -> str:
    """The error's message up to the end of its first sentence, on one line."""
    text = " ".join((str(error).strip() or type(error).__name__).split("\n")[0].split())
    text = re.split(r"(?<=[.!?])\s", text, maxsplit=1)[0]
    return text if len(text) <= 200 else text[:199] + "…"


def dispatched(program: Callable, *args: Any) -> Run:
    """Calls a jitted program again and again and waits once, as a device is kept busy.

    On a CPU it waits after each call: two calls would run side by side there.
    """
    each = jax.default_backend() == "cpu"

    def call(count):
        out = None
        for _ in range(count):
            out = None  # freed before the next is made
            out = program(*args)
            if each:
                jax.block_until_ready(out)
        jax.block_until_ready(out)

    return Run(call)


def loop(step: Callable, steps: int, unroll: int = 1) -> Callable:
    """The jitted loop of `looped`; kept for several carries, it compiles once for each shape.

    `unroll` steps stand in a row in its body: to count a round takes a GPU a program of its own,
    which a step of few microseconds is not to be charged for.
    """
    @partial(jax.jit, donate_argnums=(0, 1))
    def program(carry, out, *args):
        def one(_, held):
            # Or a GPU's compiler would fuse a step with the next, and not write the state between.
            return jax.lax.optimization_barrier(step(held[0], *args))

        return jax.lax.fori_loop(0, steps, one, (carry, out), unroll=unroll)

    return program


def looped(step: Callable, carry: Any, steps: int, *args: Any, program: Callable | None = None,
           out: Any = None, unroll: int = 1) -> Run:
    """A jitted loop of `steps` calls of `step(carry, *args)`, whose carry stays where it lies.

    For steps shorter than a dispatch. `step` returns (carry, out); out is kept, so that nothing of
    it is left out. `program` is `loop(step, steps)`, where it is there already; `out` is memory for
    that, laid out as over a mesh.
    """
    if out is None:
        shapes = jax.eval_shape(lambda carry, *args: step(carry, *args)[1], carry, *args)
        out = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), shapes)
    program = program or loop(step, steps, unroll)
    held = [(carry, out)]
    del carry, out
    each = jax.default_backend() == "cpu"

    def call(count):
        for _ in range(count):
            held[0] = program(*held[0], *args)
            if each:
                jax.block_until_ready(held[0])
        jax.block_until_ready(held[0])

    return Run(call, steps)
