"""The one table of numeric tolerances, by kind of comparison and dtype.

A test names a kind; nobody states or loosens a number in a test file. Two measures are used:
`norm_ratio` = |actual - expected|_2 / |expected|_2 over the whole array, and `peak_ratio` =
max |actual - expected| / max |expected| (how far a logit is off, in units of the largest logit).
"""

import numpy as np

# kind -> dtype of the computation under test -> (measure, bound)
TABLE = {
    # An op against its reference or a closed form.
    "kernel": {"float64": ("norm", 1e-12), "float32": ("norm", 1e-5), "bfloat16": ("norm", 4e-3)},
    # Gradients of an op against automatic differentiation of its reference.
    "gradient": {"float64": ("norm", 1e-12), "float32": ("norm", 2e-5),
                 "bfloat16": ("norm", 1.2e-2)},
    # Lightning and cache states, which stay float32 whatever the activations are.
    "state": {"float64": ("norm", 1e-12), "float32": ("norm", 1e-5), "bfloat16": ("norm", 4e-3)},
    # Whole-model logits against another implementation.
    "logits": {"float32": ("peak", 2e-4), "bfloat16": ("peak", 3e-2)},
    # The same where the model is tests/tiny.py's: those are well conditioned (measured: 9e-6).
    "tiny_logits": {"float32": ("peak", 5e-5)},
    # A layer's state deep in a model, which also carries its inputs' errors.
    "model_state": {"float32": ("norm", 5e-6), "bfloat16": ("norm", 1.5e-2)},
    # The same model on the same weights, another split into chunks, batches or devices.
    "split": {"float32": ("peak", 1e-4), "bfloat16": ("peak", 5e-2)},
    # Weights and moments after tens of updates, gradients summed over other devices: Adam divides
    # by the size of a gradient, so that the smallest ones carry the rounding of the sum.
    "training": {"float32": ("peak", 2e-5)},
    # Log probabilities and sampling scores against float64 arithmetic on the same logits.
    "sampling": {"float32": ("peak", 1e-5)},
    # Published constants given to about nine digits, computed in float32.
    "constant": {"float32": ("peak", 1e-6)},
    # Constants published with fewer digits, or up to the epsilon of a norm.
    "five_digits": {"float32": ("peak", 2e-5)},
    "three_digits": {"float32": ("peak", 5e-4)},
    # A derivative by central differences of step 1e-5.
    "finite_difference": {"float64": ("peak", 1e-6)},
}

# Greedy tokens may be compared with another implementation only where its best logit leads the
# second by this share of the largest logit: five times what "logits" allows in float32.
GREEDY_MARGIN = 1e-3
# Likewise the last expert chosen must lead the next by this much probability.
ROUTER_MARGIN = 3e-6

FP32_LOGITS_REL = TABLE["logits"]["float32"][1]


def norm_ratio(actual, expected) -> float:
    """|actual - expected| / |expected| by 2-norm; the plain norm when `expected` is zero."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    size = np.linalg.norm(expected.ravel()) or 1
    return float(np.linalg.norm((actual - expected).ravel()) / size)


def peak_ratio(actual, expected) -> float:
    """max |actual - expected| / max |expected|; the plain maximum when `expected` is zero."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if not actual.size:
        return 0.0
    return float(np.abs(actual - expected).max() / (np.abs(expected).max() or 1))


def bound(kind: str, dtype="float32") -> float:
    """The number in the table for `kind` at `dtype` (a name, a NumPy or a JAX dtype)."""
    return TABLE[kind][np.dtype(dtype).name][1]


def assert_close(actual, expected, kind: str, dtype="float32", what: str = "") -> float:
    """Fails unless `actual` is finite and within the table; returns the measured figure."""
    measure, limit = TABLE[kind][np.dtype(dtype).name]
    assert np.isfinite(np.asarray(actual, np.float64)).all(), f"{what}: not finite"
    error = (norm_ratio if measure == "norm" else peak_ratio)(actual, expected)
    assert error <= limit, f"{what}: {measure} ratio {error:.3g} > {limit:g} ({kind}, {dtype})"
    return error
