"""Every regime, on products of mesh axes, equals one device: logits, states, gradients."""

import json
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import pytest

from tests.tolerances import bound

# MESH/REGIME/ROWS[/int8][/sequence=METHOD]; rows are of uneven length, tensor=4 has more devices
# than key/value heads, and a row alone cannot be split over the batch axes.
QUICK = (
    "data=2,expert=2,tensor=2/decode/4/int8", "expert=2,tensor=4/prefill/4",
    "sequence=2,expert=2,tensor=2/long/1/dispatch=all_to_all", "data=2,sequence=2,expert=2/train/4",
)
CASES = (
    "tensor=4/decode/4", "expert=4,tensor=2/decode/4", "expert=2,tensor=2/decode/1",
    "sequence=2,expert=2,tensor=2/decode/2", "sequence=4/prefill/1",
    "data=2,sequence=2,tensor=2/prefill/4", "expert=4,tensor=2/long/1/int8/sequence=log",
    "sequence=8/long/2/sequence=ring", "expert=2,tensor=4/prefill/4/dispatch=all_to_all",
    "data=2,expert=4/prefill/8/dispatch=all_to_all", "data=2,expert=2,tensor=2/train/4",
    "slice=2,data=2,tensor=2/train/4", "sequence=4,tensor=2/train/4/context=gather",
)


def measure(cases) -> dict[str, float]:
    """Largest error of each case, as a share of the largest value."""
    done = subprocess.run([sys.executable, "-m", "tests.parallel.regimes_worker", *cases],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.multidevice
def test_a_mesh_equals_one_device():
    errors = measure(QUICK)
    assert set(errors) == {"skewed", *QUICK}
    assert max(errors.values()) <= bound("tiny_logits"), errors


@hypothesis.settings(max_examples=6, deadline=None, derandomize=True)
@hypothesis.given(
    st.permutations(("data", "sequence", "expert", "tensor")), st.sampled_from((1, 2)),
    st.sampled_from((1, 2, 4)), st.sampled_from(("decode", "prefill", "long", "train")),
    st.sampled_from((2, 4)))
@pytest.mark.slow
@pytest.mark.multidevice
def test_any_mesh_shape_equals_one_device(axes, first, second, regime, rows):
    """Eight devices shared out over any axes, in any regime."""
    sizes = dict(zip(axes, (first, second, 8 // (first * second)), strict=False))
    sizes = {name: min(size, 4) for name, size in sizes.items()}
    order = ("data", "sequence", "expert", "tensor")
    text = ",".join(f"{name}={sizes[name]}" for name in order if name in sizes)
    errors = measure([f"{text}/{regime}/{4 if regime == 'train' else rows}"])
    assert max(errors.values()) <= bound("tiny_logits"), errors


@pytest.mark.slow
@pytest.mark.multidevice
def test_every_mesh_equals_one_device():
    errors = measure(CASES)
    assert set(errors) == {"skewed", *CASES}
    assert max(errors.values()) <= bound("tiny_logits"), errors


@pytest.mark.multidevice
def test_words_that_do_not_divide_leave_the_width_to_share():
    """91 words: both tables lie over all eight devices by their width, and nothing is padded."""
    done = subprocess.run([sys.executable, "-m", "tests.parallel.vocabulary_worker"],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["errors"]) == 2 and max(found["errors"].values()) <= bound("tiny_logits")
    assert all(parts == [8, 8] for parts in found["parts"].values()), found["parts"]
    assert len(found["bytes_kept"]) == 4 and all(found["bytes_kept"].values()), found
