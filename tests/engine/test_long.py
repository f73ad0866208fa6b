"""Prompts of many chunks over eight simulated devices: the answers and states of one device."""

import json
import subprocess
import sys

import pytest

from mmx.config import LIGHTNING, SOFTMAX
from mmx.engine.engine import Engine
from mmx.engine.request import Request, SamplingParams
from tests.engine.conftest import tiny_model
from tests.engine.long_worker import CHUNK, LENGTHS
from tests.tolerances import bound

# MESH/SLOTS. One slot decodes where it was prefilled; rows of several are laid anew: over all axes
# of rows, over some of them, and over none.
QUICK = ("data=2,sequence=2,expert=2/1", "sequence=2,expert=2,tensor=2/2")
CASES = ("data=2,expert=4/1", "data=2,sequence=2,expert=2/2", "data=2,expert=4/8",
         "sequence=4,tensor=2/3", "slice=2,data=2,expert=2/4", "sequence=3,tensor=2/1")


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
        # All chunks but the last two are told of, in order, with the tokens that they hold.
        assert one["calls"][:3] == [[1, CHUNK * n, LENGTHS[1]] for n in (1, 2, 3)]


@pytest.fixture(scope="module")
def quick():
    return measure(QUICK)


@pytest.mark.multidevice
def test_long_prompts_over_a_mesh_equal_one_device(quick):
    check(quick)
    # Keys are nowhere whole, with one row or with two.
    assert [one["key_share"] for one in quick.values()] == [1 / 8, 1 / 8]


@pytest.mark.slow
@pytest.mark.multidevice
def test_long_prompts_over_any_mesh():
    check(measure(CASES))


def test_capacities_of_long_prompts_grow_by_eighths():
    engine = Engine(*tiny_model((LIGHTNING, SOFTMAX)), slots=1)
    assert [engine._capacity_for(n) for n in (1, 257, 65_536, 65_537, 4_194_304, 4_194_367)] == [
        256, 512, 65_536, 73_728, 4_194_304, 4_718_592]


def test_reading_is_told_chunk_by_chunk_two_behind():
    engine, told = Engine(*tiny_model((LIGHTNING, SOFTMAX)), slots=1, prefill_chunk=64), []
    request = Request("x", list(range(40, 60)) * 15, SamplingParams(max_tokens=1))
    list(engine.run([request], lambda *call: told.append(call)))
    assert told == [("x", 64 * n, 300) for n in (1, 2, 3)]
