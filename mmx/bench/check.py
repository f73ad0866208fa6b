"""`--check`: every implementation against float64, at the lengths where blocks begin and end."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmx.bench import arrays, cases, exact, kernels
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
    """One comparison: `program(name)` is a jitted function of `args`, `expected` its results."""

    what: str
    program: Callable[[str | None], Callable]
    args: tuple
    expected: dict[str, np.ndarray]


def trials(op: str, config: ModelConfig, dtype: str, seed: int,
           lengths: Sequence[int] = LENGTHS) -> Iterator[Trial]:
    """Yields the comparisons of one operation at the head width of `config`."""
    yield from {"lightning_attention": _lightning, "grouped_matmul": _grouped,
                "attention": _attention}[op](config, dtype, seed, lengths)


def compare(op: str, config: ModelConfig, dtype: str, seed: int, named: Sequence[str],
            lengths: Sequence[int] = LENGTHS) -> list[dict[str, Any]]:
    """Returns a record for each implementation: its worst error, and whether all passed.

    Two runs of a program must also agree in every bit.
    """
    found: dict[str, dict[str, Any]] = {}
    programs: dict[tuple, Callable] = {}
    for trial in trials(op, config, dtype, seed, lengths):
        for name in kernels.chosen(op, named):
            row = found.setdefault(name, {
                "operation": f"check_{op}", "implementation": name, "dtype": dtype, "trials": 0,
                "worst": 0.0, "where": "", "limit": LIMITS[dtype], "failures": []})
            key = (name, trial.program, tuple(x.shape if x is not None else None
                                              for x in trial.args))
            given = None if name == kernels.AUTO else name
            program = programs.setdefault(key, trial.program(given))
            try:
                first, second = (jax.device_get(program(*trial.args)) for _ in range(2))
            except Exception as error:
                row["failures"].append(f"{trial.what}: {first_sentence(error)}")
                continue
            _judge(row, trial, first, second)
    for row in found.values():
        row["passed"] = not row["failures"] and row["trials"] > 0
        row["shape"] = f"{row['trials']} trials"
    return list(found.values())


def _judge(row: dict, trial: Trial, first: dict, second: dict) -> None:
    row["trials"] += 1
    for name, expected in trial.expected.items():
        ratio = norm_ratio(first[name], expected)
        where = f"{trial.what}, {name}"
        if not ratio <= row["worst"]:
            row["worst"], row["where"] = ratio, where
        if not ratio <= row["limit"]:
            row["failures"].append(f"{where}: error {ratio:.3g}")
        if first[name].tobytes() != second[name].tobytes():
            row["failures"].append(f"{where}: two runs differ")


def norm_ratio(actual, expected) -> float:
    """|actual - expected| / |expected| by 2-norm; the plain norm when `expected` is zero."""
    actual = np.asarray(actual, np.float64)
    return float(np.linalg.norm(actual - expected) / (np.linalg.norm(expected) or 1))


def _drawn(seed: int, dtype: str, **shapes) -> list[jax.Array]:
    return [arrays.values(arrays.named_key(seed, f"check {name}"), shape, dtype)
            for name, shape in shapes.items()]


def _double(*values) -> list[np.ndarray]:
    return [np.asarray(x, np.float64) for x in values]


def _lightning(config, dtype, seed, lengths) -> Iterator[Trial]:
    """Output, state and four gradients: plain, and with a state for whole and for packed rows."""
    H = config.head_dim
    slopes_LN = decay_slopes(preset("text01"))
    for T in lengths:
        B = 2
        q, k, v, do = _drawn(seed + T, dtype, **dict.fromkeys(("q", "k", "v", "do"),
                                                              (B, T, HEADS, H)))
        state, dstate = _drawn(seed + T, "float32", **dict.fromkeys(("state", "dstate"),
                                                                    (B, HEADS, H, H)))
        starts = np.zeros((B, T), bool)
        starts[1, [T // 3, T // 2, T - 1]] = True  # the last sample is one token
        inputs = _double(q, k, v, do)
        for layer in LAYERS:
            # From the fastest decay to the slowest.
            slopes = slopes_LN[layer][np.linspace(0, 63, HEADS).astype(int)]
            for what, given, marks in (("plain", None, None), ("state", state, starts)):
                held = np.zeros(state.shape) if given is None else np.asarray(given, np.float64)
                expected = exact.lightning(
                    *inputs[:3], slopes.astype(np.float64), held,
                    np.zeros_like(starts) if marks is None else marks, inputs[3],
                    np.asarray(dstate, np.float64))
                if given is None:
                    del expected["dstate"]
                yield Trial(f"T={T} layer {layer} {what}", _lightning_program,
                            (q, k, v, jnp.asarray(slopes), given,
                             None if marks is None else jnp.asarray(marks), do, dstate), expected)


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


def _grouped(config, dtype, seed, lengths) -> Iterator[Trial]:
    """Skewed groups, an empty one, and rows that belong to none."""
    E, D, F = 8, 4 * config.head_dim, 6 * config.head_dim
    (w,) = _drawn(seed, dtype, w=(E, D, F))
    for M in [T for T in lengths if T < 4096]:
        (x,) = _drawn(seed + M, dtype, x=(M, D))
        sizes = cases.skewed_groups(E, M - M // 5, M)
        sizes[0], sizes[1] = 0, sizes[0] + sizes[1]
        yield Trial(f"{M} rows", _grouped_program, (x, w, jnp.asarray(sizes)),
                    exact.grouped(*_double(x, w), sizes))


def _grouped_program(name):
    return jax.jit(lambda x, w, sizes: {
        "out": grouped_matmul(x, w, sizes, implementation=name)})


def _attention(config, dtype, seed, lengths) -> Iterator[Trial]:
    """Whole prompts, and chunks and single tokens behind others at offsets that differ by row."""
    K, H = 2, config.head_dim
    for T in [T for T in lengths if T < 4096]:
        for what, S, offsets in (("prompt", T, None), ("behind", T + 300, np.array([0, 299]))):
            q, k, v = _drawn(seed + T, dtype, q=(2, T, 2 * K, H), k=(2, S, K, H), v=(2, S, K, H))
            expected = exact.attention(*_double(q, k, v), np.zeros(2, int) if offsets is None
                                       else offsets)
            given = None if offsets is None else jnp.asarray(offsets, jnp.int32)
            yield Trial(f"T={T} {what}", _attention_program, (q, k, v, given), expected)


def _attention_program(name):
    return jax.jit(lambda q, k, v, offsets: {
        "out": attention(q, k, v, offsets_B=offsets, implementation=name)})


def run(config: ModelConfig, seed: int, named: Sequence[str], lengths: Sequence[int] = LENGTHS
        ) -> Iterator[Callable[[], list[dict]]]:
    """Yields one piece of work for each operation and dtype; calling it gives its records."""
    for op in kernels.OPS:
        for dtype in LIMITS:
            yield partial(compare, op, config, dtype, seed, named, lengths)
