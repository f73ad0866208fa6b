"""Every regime, on products of mesh axes, equals one device: logits, states, gradients."""

import json
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import pytest

from tests.tolerances import bound

# MESH/REGIME/ROWS[/int8][/NAME=CHOICE], where rows are of uneven length, tensor=4 has more devices
# than key/value heads, and a row alone cannot be split over the batch axes; and
# skewed/DISPATCH/ROWS/GROUPS/TENSOR.
QUICK = (
    "data=2,expert=2,tensor=2/decode/4/int8", "expert=2,tensor=4/prefill/4",
    "sequence=2,expert=2,tensor=2/long/1/dispatch=all_to_all",
    "data=2,sequence=2,expert=2/train/4/dispatch=ragged/groups=2/capacity=0.75",
    "skewed/all_to_all/all/1/1", "skewed/ragged/part/2/2",
)
CASES = (
    "tensor=4/decode/4", "expert=4,tensor=2/decode/4", "expert=2,tensor=2/decode/1",
    "sequence=2,expert=2,tensor=2/decode/2", "sequence=4/prefill/1",
    "data=2,sequence=2,tensor=2/prefill/4", "expert=4,tensor=2/long/1/int8/sequence=log",
    "sequence=8/long/2/sequence=ring", "expert=2,tensor=4/prefill/4/dispatch=all_to_all",
    "data=2,expert=4/prefill/8/dispatch=all_to_all", "data=2,expert=2,tensor=2/train/4",
    "data=2,sequence=2,expert=2/train/4",
    "data=2,expert=2,tensor=2/train/4/dispatch=ragged/rows=part/groups=2/capacity=0.75",
    *(f"skewed/{form}/{rows}/{groups}/{tensor}" for form in ("all_to_all", "ragged")
      for rows, groups, tensor in (("all", 1, 2), ("part", 3, 4))),
    "sequence=2,expert=4/long/1/int8/dispatch=ragged/groups=2",
    "expert=4,tensor=2/decode/4/dispatch=ragged/rows=part",
    "data=4,sequence=2/train/4/capacity=0.5",
    *(f"expert=4,tensor=2/train/4/capacity={factor}/dispatch={way}"
      for factor in (0, 0.5, 1.5) for way in ("all_to_all", "ragged/rows=part")),
    "expert=4,tensor=2/train/4/capacity=0.5/dispatch=sum",
    "expert=2,tensor=4/prefill/4/dispatch=all_to_all/rows=part/groups=3",
    "sequence=2,expert=2,tensor=2/train/4/capacity=0.75/dispatch=all_to_all/groups=2",
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
    assert set(errors) == set(QUICK)
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
    assert set(errors) == set(CASES)
    assert max(errors.values()) <= bound("tiny_logits"), errors
