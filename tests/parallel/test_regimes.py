"""Every regime, on products of mesh axes, equals one device: logits, states, gradients."""

import json
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import pytest

from tests.tolerances import bound

# MESH/REGIME/ROWS[/int8[/turned]][/in_place][/NAME=CHOICE], where rows are of uneven length,
# tensor=4 has more devices than key/value heads, and a row alone cannot be split over the batch
# axes; cuDNN is a stand-in, and the kernel of states in place. And
# skewed/DISPATCH/ROWS/GROUPS/TENSOR.
QUICK = (
    "data=2,expert=2,tensor=2/decode/4/int8/in_place", "expert=2,tensor=2/decode/4/int8/turned",
    "expert=2,tensor=4/prefill/4", "expert=2,tensor=4/prefill/4/sums=pieces",
    "sequence=2,expert=2,tensor=2/long/1/sums=pieces", "expert=2,tensor=4/prefill/4/sums=narrow",
    "sequence=2,expert=2,tensor=2/long/1/dispatch=all_to_all",
    "data=2,sequence=4/prefill/2/softmax=cudnn",
    "data=2,sequence=2,expert=2/train/4/dispatch=ragged/groups=2/capacity=0.75",
    "skewed/all_to_all/all/1/1", "skewed/ragged/part/2/2",
)
CASES = (
    "tensor=4/decode/4", "expert=4,tensor=2/decode/4", "sequence=2,tensor=4/decode/2/in_place",
    "expert=2,tensor=2/decode/1",
    "sequence=2,expert=2,tensor=2/decode/2", "sequence=4/prefill/1",
    "data=2,sequence=2,tensor=2/prefill/4", "expert=4,tensor=2/long/1/int8/sequence=log",
    "sequence=2,tensor=4/prefill/1/int8/sums=pieces", "data=2,expert=4/long/1/sums=pieces",
    "expert=2,tensor=4/prefill/2/dispatch=all_to_all/rows=part/sums=pieces",
    "expert=2,tensor=2/long/1/dispatch=ragged/rows=part/sums=narrow/groups=2",
    "sequence=2,expert=2,tensor=2/long/1/dispatch=all_to_all/sums=pieces",
    "sequence=8/long/2/sequence=ring", "data=2,sequence=2,expert=2/long/1",
    "expert=2,tensor=4/prefill/4/dispatch=all_to_all",
    "data=2,expert=4/prefill/8/dispatch=all_to_all", "data=2,expert=2,tensor=2/train/4",
    "data=2,sequence=2,expert=2/train/4",
    "data=2,expert=2,tensor=2/train/4/dispatch=ragged/rows=part/groups=2/capacity=0.75",
    "expert=4,tensor=2/prefill/4/int8/turned/dispatch=all_to_all",
    "sequence=2,expert=2,tensor=2/long/1/int8/turned/sums=pieces",
    "tensor=4/prefill/2/int8/turned/sums=pieces", "expert=1/decode/2/int8/turned",
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

# The same over real processes: PROCESSES x DEVICES of each.
QUICK_PODS = {"2x2": ("sequence=2,tensor=2/train/4", "sequence=2,expert=2/long/1")}
PODS = {
    "2x1": ("sequence=2/long/2/sequence=ring", "sequence=2/train/4", "expert=2/decode/4",
            "tensor=2/decode/2/int8", "data=2/prefill/4", "tensor=2/train/4", "expert=2/train/4"),
    "2x2": ("expert=2,tensor=2/train/4", "data=2,expert=2/decode/4",
            "sequence=2,tensor=2/prefill/2", "data=2,sequence=2/train/4/context=gather",
            "expert=2,tensor=2/decode/1", "expert=2,tensor=2/prefill/4/int8"),
    "4x1": ("sequence=2,tensor=2/train/4", "sequence=2,tensor=2/long/1/sequence=log",
            "expert=2,tensor=2/prefill/4", "expert=4/prefill/4/dispatch=all_to_all",
            "slice=2,data=2/train/4", "data=2,expert=2/train/4", "sequence=2,expert=2/decode/1",
            "tensor=4/decode/4", "sequence=4/train/4"),
}


def measure_pod(pod: str, cases) -> dict[str, float]:
    """As `measure`, in processes joined over loopback."""
    processes, devices = pod.split("x")
    done = subprocess.run(
        ["bash", "launch/local_pod.sh", processes, f"--devices={devices}", "--", sys.executable,
         "-m", "tests.parallel.regimes_worker", *cases],
        capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines()
                           if line.startswith("[0] {"))[4:])


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


@pytest.mark.multidevice
@pytest.mark.parametrize("pod", QUICK_PODS)
def test_processes_equal_one_device(pod):
    errors = measure_pod(pod, QUICK_PODS[pod])
    assert set(errors) == set(QUICK_PODS[pod])
    assert max(errors.values()) <= bound("tiny_logits"), errors


@pytest.mark.slow
@pytest.mark.multidevice
@pytest.mark.parametrize("pod", PODS)
def test_every_regime_over_processes_equals_one_device(pod):
    errors = measure_pod(pod, PODS[pod])
    assert set(errors) == set(PODS[pod])
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
