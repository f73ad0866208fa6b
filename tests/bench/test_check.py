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


@pytest.mark.parametrize("op", kernels.OPS)
@pytest.mark.parametrize("dtype", list(check.LIMITS))
def test_what_runs_here_passes(op, dtype):
    rows = check.compare(op, preset("nano"), dtype, 0, (), lengths=(1, 65))
    assert {row["implementation"] for row in rows} == set(kernels.chosen(op, ()))
    for row in rows:
        assert row["passed"] and row["trials"] > 0 and not row["failures"]
        assert 0 < row["worst"] <= row["limit"]


@pytest.mark.parametrize("fault, words", [
    (lambda out: out * 1.01, "error"), (lambda out: out.at[0].set(jnp.nan), "error nan")])
def test_a_wrong_result_fails(monkeypatch, fault, words):
    monkeypatch.setattr(check, "_grouped_program", lambda name: jax.jit(lambda x, w, sizes: {
        "out": fault(check.grouped_matmul(x, w, sizes))}))
    (row,) = check.compare("grouped_matmul", preset("nano"), "float32", 0, ("tiled",), (65,))
    assert not row["passed"] and words in row["failures"][0]


def test_results_that_change_from_run_to_run_fail(monkeypatch):
    noise = iter(range(10))

    def unsteady(name):
        return lambda x, w, sizes: {"out": np.asarray(check.grouped_matmul(x, w, sizes))
                                    * np.float32(1 + next(noise) * 1e-7)}
    monkeypatch.setattr(check, "_grouped_program", unsteady)
    (row,) = check.compare("grouped_matmul", preset("nano"), "float32", 0, ("tiled",), (65,))
    assert [one for one in row["failures"] if "two runs differ" in one]


def test_one_that_raises_fails_with_its_sentence(monkeypatch):
    def refuses(*args):
        raise ValueError("Not today. Try later.")

    monkeypatch.setattr(check, "_grouped_program", lambda name: refuses)
    (row,) = check.compare("grouped_matmul", preset("nano"), "float32", 0, ("tiled",), (65,))
    assert not row["passed"] and row["failures"] == ["65 rows: Not today."]
