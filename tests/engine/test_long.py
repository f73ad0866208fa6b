"""Prompts of many chunks over eight simulated devices: the answers and states of one device."""

import json
import subprocess
import sys

import pytest

from mmx.config import LIGHTNING, SOFTMAX
from mmx.engine.engine import Engine
from mmx.engine.request import Request, SamplingParams
from tests.engine.conftest import tiny_model
from tests.tolerances import bound

# One slot decodes where it was prefilled; rows of several are laid anew: over all axes of rows,
# over some of them, and over none.
QUICK = ("data=2,sequence=2,expert=2/2",)
MOVES = ("expert=8/8/moves", "data=2,sequence=2,expert=2/2/moves", "sequence=4,tensor=2/3/moves",
         "slice=2,data=2,expert=2/4/moves", "sequence=2,expert=3/3/moves", "tensor=4/2/moves")
CASES = ("data=2,sequence=2,expert=2/1/all", "sequence=2,expert=2,tensor=2/2/all",
         "data=2,expert=4/8/all", "sequence=3,tensor=2/1")


def measure(cases):
    done = subprocess.run([sys.executable, "-m", "tests.engine.long_worker", *cases],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == set(cases)
    return found


def check(found):
    for case, one in found.items():
        assert one["ids"] and one["told"], case
        assert one["logprobs"] <= bound("split") and one["states"] <= bound("split"), (case, one)


@pytest.mark.multidevice
def test_long_prompts_over_a_mesh_equal_one_device():
    found = measure((*QUICK, *MOVES))
    assert [case for case in MOVES if not found.pop(case)] == []
    check(found)
    assert found[QUICK[0]]["key_share"] == 1 / 8  # of two rows, nowhere one whole


@pytest.mark.slow
@pytest.mark.multidevice
def test_long_prompts_over_any_mesh():
    found = measure(CASES)
    check(found)
    # A chunk's step needs no more for a longer context, but for one layer's share of keys and
    # values, which the scan over two of them cuts out.
    one = found[CASES[0]]
    assert one["key_share"] == 1 / 8
    sizes = {int(capacity): size for capacity, size in one["temporaries"].items()}
    (short, least), *_, (long, most) = sorted(sizes.items())
    keys_and_values = 2 * one["key_bytes"] * one["key_share"] / 2
    assert most - least <= 1.05 * keys_and_values * (long - short), sizes
    assert most - least < 0.2 * least and long == 16 * short, sizes


def test_capacities_of_long_prompts_grow_by_eighths():
    engine = Engine(*tiny_model((LIGHTNING, SOFTMAX)), slots=1)
    assert [engine._capacity_for(n) for n in (1, 257, 65_536, 65_537, 4_194_304, 4_194_367)] == [
        256, 512, 65_536, 73_728, 4_194_304, 4_718_592]


def test_reading_is_told_chunk_by_chunk_two_behind():
    engine, told = Engine(*tiny_model((LIGHTNING, SOFTMAX)), slots=1, prefill_chunk=64), []
    request = Request("x", list(range(40, 60)) * 15, SamplingParams(max_tokens=1))
    list(engine.run([request], lambda *call: told.append(call)))
    assert told == [("x", 64 * n, 300) for n in (1, 2, 3)]
