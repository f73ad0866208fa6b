"""The comparison itself: float64 against plain definitions, and that it sees what is wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx.bench import check, exact, kernels
from mmx.config import preset
from tests.tolerances import assert_close


def test_exact_lightning_against_its_closed_form():
    rng = np.random.default_rng(0)
    q, k, v, do = rng.normal(size=(4, 1, 7, 2, 3))
    state, dstate = rng.normal(size=(2, 1, 2, 3, 3))
    slopes = np.array([0.1, 0.9])
    starts = np.zeros((1, 7), bool)
    got = exact.lightning(q, k, v, slopes, state, starts, do, dstate)
    t = np.arange(7)
    for n, slope in enumerate(slopes):
        decay = np.tril(np.exp(-slope * (t[:, None] - t)))
        out = (q[0, :, n] @ k[0, :, n].T * decay) @ v[0, :, n]
        out += np.exp(-slope * (t + 1))[:, None] * (q[0, :, n] @ state[0, n])
        assert_close(got["out"][0, :, n], out, "kernel", "float64")


def test_exact_gradients_by_differences():
    rng = np.random.default_rng(1)
    values = dict(zip("qkv", rng.normal(size=(3, 1, 5, 1, 2)), strict=True))
    state, dstate = rng.normal(size=(2, 1, 1, 2, 2))
    do, starts = rng.normal(size=(1, 5, 1, 2)), np.array([[False, False, True, False, False]])

    def loss(state=state, **changed):
        got = exact.lightning(*({**values, **changed}[x] for x in "qkv"), np.array([0.3]), state,
                              starts, do, dstate)
        return np.sum(got["out"] * do) + np.sum(got["state"] * dstate)

    got = exact.lightning(*values.values(), np.array([0.3]), state, starts, do, dstate)
    for name, x in {**values, "state": state}.items():
        step = 1e-5 * np.eye(x.size).reshape(x.size, *x.shape)
        slope = [(loss(**{name: x + one}) - loss(**{name: x - one})) / 2e-5 for one in step]
        assert_close(got[f"d{name}"].ravel(), slope, "finite_difference", "float64")


NANO = preset("nano")


def compared(trials, named=()):
    """The rows and the failures that were told."""
    comparison = check.Comparison(trials, named)
    told = list(comparison.run())
    assert len(told) == comparison.total
    return comparison.rows(), [one for failures in told for one in failures]


def grouped(*lengths):
    """Trials in float32 and in bfloat16 of each of the lengths."""
    return check.trials(NANO, 0, lengths, ("grouped_matmul",))


def test_what_runs_here_passes():
    rows, told = compared(check.trials(NANO, 0, (65, 1)))
    assert [(row["operation"], row["dtype"], row["implementation"]) for row in rows] == [
        (f"check_{op}", dtype, name) for op in kernels.OPS for dtype in check.LIMITS
        for name in kernels.chosen(op, ())]
    for row in rows:
        assert row["passed"] and not row["failures"] and 0 < row["worst"] <= row["limit"]
        assert row["trials"] == row["planned"] == {"lightning_attention": 12, "grouped_matmul": 2,
                                                   "attention": 4}[row["operation"][6:]]
    assert not told


def test_the_shortest_come_first_and_without_drawing(monkeypatch):
    monkeypatch.setattr(check, "_drawn", None)  # a call would raise
    whats = [trial.what for trial in check.trials(NANO, 0, (4097, 65, 1))]
    firsts = [next(i for i, what in enumerate(whats) if what.startswith(f"T={T} "))
              for T in (1, 65, 4097)]
    assert firsts == sorted(firsts) == [0, 18, 36] and len(whats) == 48


def test_one_program_for_all_implementations_that_are_the_same(monkeypatch):
    compiled = []
    begin = check.ThreadPoolExecutor.submit

    def submit(self, function, *args):
        compiled.extend([function] * (not args))  # a program takes none, a reference its inputs
        return begin(self, function, *args)

    monkeypatch.setattr(check.ThreadPoolExecutor, "submit", submit)
    # The automatic choice is "xla" here; the layers share a program, with and without a state.
    rows, _ = compared(check.trials(NANO, 0, (2,), ("lightning_attention",)), ("auto", "xla"))
    assert len(rows) == 4 and all(row["passed"] for row in rows) and len(compiled) == 4


@pytest.mark.parametrize("fault, words", [
    (lambda out: out * 1.01, "error"), (lambda out: out.at[0].set(jnp.nan), "error nan")])
def test_a_wrong_result_fails(monkeypatch, fault, words):
    monkeypatch.setattr(check, "_grouped_program", lambda name: jax.jit(lambda x, w, sizes: {
        "out": fault(check.grouped_matmul(x, w, sizes))}))
    (row, _), told = compared(grouped(65), ("tiled",))
    assert not row["passed"] and words in row["failures"][0]
    assert told[0] == f"grouped_matmul float32 tiled, {row['failures'][0]}"


def test_results_that_change_from_run_to_run_fail(monkeypatch):
    noise = iter(range(10))

    def unsteady(x, w, sizes):
        factor = jax.pure_callback(lambda: np.float32(1 + next(noise) * 1e-7),
                                   jax.ShapeDtypeStruct((), jnp.float32))
        return {"out": check.grouped_matmul(x, w, sizes) * factor}

    monkeypatch.setattr(check, "_grouped_program", lambda name: jax.jit(unsteady))
    (row, _), _ = compared(grouped(65), ("tiled",))
    assert row["failures"] == ["65 rows, out: two runs differ"] and row["trials"] == 1


@pytest.mark.parametrize("stage", ["traced", "compiled", "run"])
def test_one_that_raises_fails_with_its_sentence(monkeypatch, stage):
    def refuses(*args):
        raise ValueError("Not today. Try later.")

    fails = {"traced": jax.jit(refuses),
             "compiled": Steps(lambda: refuses), "run": Steps(lambda: lambda: refuses)}[stage]
    sound = check._grouped_program
    monkeypatch.setattr(check, "_grouped_program",
                        lambda name: fails if name == "tiled" else sound(name))
    rows, told = compared(grouped(1, 65), ("tiled", "ragged_dot"))
    for row in rows:
        failed = row["implementation"] == "tiled"
        assert row["passed"] is not failed and row["trials"] == row["planned"] == 2
        assert row["failures"] == (["1 rows: Not today.", "65 rows: Not today."] if failed else [])
    # A reason is told once for each dtype.
    assert told == [f"grouped_matmul {dtype} tiled, 1 rows: Not today." for dtype in check.LIMITS]


class Steps:
    """Stands for a jitted function; `make()` stands for `compile`, and a program for it."""

    def __init__(self, make):
        self.make = make

    def lower(self, *args):
        return self

    def as_text(self):
        return "a program"

    def compile(self):
        return self.make()()


def test_what_was_compared_before_a_stop_is_kept():
    comparison = check.Comparison(grouped(1, 65, 257), ("tiled", "ragged_dot"))
    running = comparison.run()
    for _ in range(9):  # of 12: both dtypes of 1 and 65 rows, then one implementation of 257
        next(running)
    running.close()
    found = {(row["dtype"], row["implementation"]): row for row in comparison.rows()}
    first = found["float32", "ragged_dot"], found["float32", "tiled"]
    assert sorted(row["trials"] for row in first) == [2, 3]
    assert [row["passed"] for row in found.values()].count(True) == 1
    for row in found.values():
        assert row["passed"] is (row["trials"] == 3) and row["planned"] == 3 and row["worst"] > 0
        assert row["shape"] == ("3 trials" if row["passed"] else "2 of 3 trials")


def test_a_reference_that_fails_ends_the_run_and_keeps_the_rest(monkeypatch):
    def fails_late(x, w, sizes):
        if len(x) == 65:
            raise MemoryError
        return {"out": np.zeros((1, w.shape[2]))}

    monkeypatch.setattr(exact, "grouped", fails_late)
    comparison = check.Comparison(grouped(1, 65), ("tiled",))
    with pytest.raises(MemoryError):
        list(comparison.run())
    assert [row["trials"] for row in comparison.rows()] == [1, 1]
