"""`--check`: every implementation against float64, at the lengths where blocks begin and end."""

import dataclasses
import functools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmx.bench import arrays, cases, exact, kernels
from mmx.bench.report import made
from mmx.bench.timing import first_sentence
from mmx.config import ModelConfig, preset
from mmx.nn.lightning import decay_slopes
from pallas_kernels import attention, grouped_matmul, lightning_attention

LENGTHS = (1, 63, 64, 65, 255, 256, 257, 4097)
LAYERS = (0, 40, 78)  # of the released model's 80: fast decay, middle, next to none
# |actual - expected| / |expected| over a whole array.
LIMITS = {"float32": 1e-5, "bfloat16": 4e-3}
HEADS = 4


@dataclasses.dataclass(frozen=True)
class Trial:
    """What is compared: `program(name)`, a jitted function, and `expected`, its results in float64.

    Both take `args()`.
    """

    op: str
    dtype: str
    what: str
    program: Callable[[str | None], Callable]
    args: Callable[[], tuple]
    expected: Callable[..., dict[str, np.ndarray]]


def trials(config: ModelConfig, seed: int, lengths: Sequence[int],
           ops: Sequence[str] = kernels.OPS) -> list[Trial]:
    """The comparisons at the head width of `config`, the shortest first; nothing is drawn yet."""
    make = {"lightning_attention": _lightning, "grouped_matmul": _grouped, "attention": _attention}
    return [Trial(op, dtype, *rest) for T in sorted(lengths) for op in ops for dtype in LIMITS
            for rest in make[op](config, dtype, seed, T)]


class Comparison:
    """Trials of each implementation; `rows()` tells at any time what has been compared so far.

    Two runs of a program must also agree in every bit.
    """

    def __init__(self, trials: Sequence[Trial], named: Sequence[str]):
        self._rows: dict[tuple[str, str], dict[str, dict]] = {}  # by operation and dtype, by name
        for trial in trials:
            op, dtype = trial.op, trial.dtype
            found = self._rows.setdefault((op, dtype), {name: {
                "operation": f"check_{op}", "implementation": name, "dtype": dtype, "trials": 0,
                "planned": 0, "worst": 0.0, "where": "", "limit": LIMITS[dtype], "failures": []}
                for name in kernels.chosen(op, named)})
            for row in found.values():
                row["planned"] += 1
        self._waiting = deque(one for one in trials if self._rows[one.op, one.dtype])
        self.total = sum(row["planned"] for row in self.rows())

    def run(self) -> Iterator[list[str]]:
        """Compares; yields the failures of each trial of each implementation, as sentences.

        Programs are compiled, and references reckoned, on all cores ahead of their use: for at
        most twice as many trials as there are cores. A reason to fail is told once.
        """
        cores = os.cpu_count() or 1
        pool = ThreadPoolExecutor(cores)
        programs: dict = {}
        ahead: deque = deque()
        told = set()
        try:
            while self._waiting or ahead:
                while self._waiting and len(ahead) < 2 * cores:
                    ahead.append(self._begin(self._waiting.popleft(), pool, programs))
                    if all(one.done() for one in (ahead[0][2], *ahead[0][3].values())):
                        break  # what is ready is told at once
                trial, args, expected, compiled = ahead.popleft()
                for name, program in compiled.items():
                    row = self._rows[trial.op, trial.dtype][name]
                    found = _failures(row, trial.what, program, args, expected.result())
                    row["failures"] += [f"{where}: {why}" for where, why in found]
                    row["trials"] += 1
                    who = f"{trial.op} {trial.dtype} {name}"
                    yield [f"{who}, {where}: {why}" for where, why in found
                           if (who, why) not in told]
                    told |= {(who, why) for _, why in found}
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _begin(self, trial: Trial, pool: ThreadPoolExecutor, programs: dict):
        args = trial.args()
        return (trial, args, pool.submit(trial.expected, *args),
                {name: _compiled(trial.program, name, args, pool, programs)
                 for name in self._rows[trial.op, trial.dtype]})

    def rows(self) -> list[dict[str, Any]]:
        """A record for each operation, dtype and implementation: worst error, trials, failures.

        `passed` is true when all trials that were planned were made and none failed.
        """
        return [{**row, "passed": not row["failures"] and row["trials"] == row["planned"] > 0,
                 "shape": f"{made(row)} trials"}
                for found in self._rows.values() for row in found.values()]


def _compiled(make: Callable, name: str, args: tuple, pool: ThreadPoolExecutor, programs: dict
              ) -> Future:
    """The program being compiled: one for all trials of these shapes, and for all implementations
    that are the same program, as the automatic choice is that of another."""
    key = (make, name, *(x if x is None else (x.shape, x.dtype) for x in args))
    if key not in programs:
        try:
            # Not in the pool: tracing is Python, of which one thread runs at a time.
            lowered = make(None if name == kernels.AUTO else name).lower(*args)
            text = lowered.as_text()
            if text not in programs:
                programs[text] = pool.submit(lowered.compile, **_options())
            programs[key] = programs[text]
        except Exception as error:
            programs[key] = Future()
            programs[key].set_exception(error)
    return programs[key]


def _options() -> dict[str, Any]:
    """Without trying out which product is fastest: on a GPU that takes longer than all the rest,
    one program at a time."""
    return ({"compiler_options": {"xla_gpu_autotune_level": 0}}
            if jax.default_backend() == "gpu" else {})


def _failures(row: dict, what: str, program: Future, args: tuple, expected: dict
              ) -> list[tuple[str, str]]:
    """Runs a program twice; where it fails and why. Keeps the worst error in `row`."""
    try:
        first, second = (jax.device_get(program.result()(*args)) for _ in range(2))
    except Exception as error:
        return [(what, first_sentence(error))]
    failures = []
    for name, exactly in expected.items():
        ratio, where = norm_ratio(first[name], exactly), f"{what}, {name}"
        if not ratio <= row["worst"]:
            row["worst"], row["where"] = ratio, where
        if not ratio <= row["limit"]:
            failures.append((where, f"error {ratio:.3g}"))
        if first[name].tobytes() != second[name].tobytes():
            failures.append((where, "two runs differ"))
    return failures


def norm_ratio(actual, expected) -> float:
    """|actual - expected| / |expected| by 2-norm; the plain norm when `expected` is zero."""
    actual = np.asarray(actual, np.float64)
    return float(np.linalg.norm(actual - expected) / (np.linalg.norm(expected) or 1))


def _drawn(seed: int, dtype: str, **shapes) -> list[jax.Array]:
    return [arrays.values(arrays.named_key(seed, f"check {name}"), shape, dtype)
            for name, shape in shapes.items()]


def _double(*values) -> list[np.ndarray]:
    return [np.asarray(x, np.float64) for x in values]


def _lightning(config, dtype, seed, T) -> Iterator[tuple]:
    """Output, state and four gradients: plain, and with a state for whole and for packed rows."""
    B, H = 2, config.head_dim
    slopes_LN = decay_slopes(preset("text01"))

    @functools.cache
    def drawn():
        return (*_drawn(seed + T, dtype, **dict.fromkeys(("q", "k", "v", "do"), (B, T, HEADS, H))),
                *_drawn(seed + T, "float32", **dict.fromkeys(("state", "dstate"),
                                                             (B, HEADS, H, H))))

    def args(layer, behind):
        q, k, v, do, state, dstate = drawn()
        # From the fastest decay to the slowest.
        slopes = slopes_LN[layer][np.linspace(0, 63, HEADS).astype(int)]
        starts = np.zeros((B, T), bool)
        starts[1, [T // 3, T // 2, T - 1]] = True  # the last sample is one token
        return (q, k, v, jnp.asarray(slopes), *((state, jnp.asarray(starts)) if behind else
                                                (None, None)), do, dstate)

    for layer in LAYERS:
        for what in ("plain", "state"):
            yield (f"T={T} layer {layer} {what}", _lightning_program,
                   functools.partial(args, layer, what == "state"), _lightning_expected)


def _lightning_expected(q, k, v, slopes, state, starts, do, dstate):
    plain = state is None
    expected = exact.lightning(
        *_double(q, k, v, slopes), *_double(np.zeros(dstate.shape) if plain else state),
        np.zeros(q.shape[:2], bool) if plain else np.asarray(starts), *_double(do, dstate))
    if plain:
        del expected["dstate"]
    return expected


def _lightning_program(name):
    @jax.jit
    def program(q, k, v, slopes, state, starts, do, dstate):
        def forward(q, k, v, state):
            return lightning_attention(q, k, v, slopes, state, starts_BT=starts,
                                       implementation=name)

        (out, after), back = jax.vjp(forward, q, k, v, state)
        dq, dk, dv, dbefore = back((do, dstate))
        return {"out": out, "state": after, "dq": dq, "dk": dk, "dv": dv, "dstate": dbefore}
    return program


def _grouped(config, dtype, seed, M) -> Iterator[tuple]:
    """Skewed groups, an empty one, and rows that belong to none."""
    E, D, F = 8, 4 * config.head_dim, 6 * config.head_dim

    def args():
        sizes = cases.skewed_groups(E, M - M // 5, M)
        sizes[0], sizes[1] = 0, sizes[0] + sizes[1]
        return (*_drawn(seed + M, dtype, x=(M, D)), *_drawn(seed, dtype, w=(E, D, F)),
                jnp.asarray(sizes))

    if M < 4096:
        yield f"{M} rows", _grouped_program, args, lambda x, w, sizes: exact.grouped(
            *_double(x, w), np.asarray(sizes))


def _grouped_program(name):
    return jax.jit(lambda x, w, sizes: {
        "out": grouped_matmul(x, w, sizes, implementation=name)})


def _attention(config, dtype, seed, T) -> Iterator[tuple]:
    """Whole prompts, and chunks and single tokens behind others at offsets that differ by row."""
    K, H = 2, config.head_dim

    def args(S, offsets):
        return (*_drawn(seed + T, dtype, q=(2, T, 2 * K, H), k=(2, S, K, H), v=(2, S, K, H)),
                None if offsets is None else jnp.asarray(offsets, jnp.int32))

    if T < 4096:
        for what, S, offsets in (("prompt", T, None), ("behind", T + 300, (0, 299))):
            yield (f"T={T} {what}", _attention_program, functools.partial(args, S, offsets),
                   lambda q, k, v, offsets: exact.attention(*_double(q, k, v), np.asarray(
                       (0, 0) if offsets is None else offsets)))


def _attention_program(name):
    return jax.jit(lambda q, k, v, offsets: {
        "out": attention(q, k, v, offsets_B=offsets, implementation=name)})
