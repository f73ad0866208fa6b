"""The engine over eight simulated devices beside one device: long prompts; prints JSON."""

import json
import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from mmx import model
from mmx.config import LIGHTNING, SOFTMAX
from mmx.engine.engine import Engine
from mmx.engine.request import Request, SamplingParams
from mmx.sharding.mesh import parse_mesh
from mmx.sharding.rules import DECODE, param_shardings
from tests.engine.conftest import tiny_model
from tests.tolerances import peak_ratio

CONFIG, PARAMS = tiny_model((LIGHTNING, SOFTMAX) * 2)
CHUNK = 512
RANDOM = np.random.default_rng(7)
# One prompt of many chunks among short ones, so that its row moves into a batch that decodes; the
# last makes the cache grow while others run.
LENGTHS = (20, 1900, 3, 90, 2600)
REQUESTS = [
    Request(number, RANDOM.integers(10, 90, length).tolist(), SamplingParams(
        max_tokens=9 if length < 1900 else 5, logprobs=3, ignore_eos=True,
        repetition_penalty=1.0 + 0.1 * (number == 1)))
    for number, length in enumerate(LENGTHS)]


def answers(params, slots: int, requests=REQUESTS):
    """Ids and log-probabilities of each request, the states left behind, calls of `told`."""
    engine, calls = Engine(CONFIG, params, slots=slots, prefill_chunk=CHUNK), []
    found = {event.key: event.result for event in engine.run(
        requests, lambda *told: calls.append(told)) if event.result is not None}
    states = [np.asarray(memory["state"]) for stack in engine._cache.stacks for memory in stack
              if "state" in memory]
    results = [found[request.key] for request in requests]
    return ([result.ids for result in results],
            np.asarray([one.logprob for result in results for one in result.logprobs]),
            states, calls, engine)


def temporaries(params) -> dict[int, int]:
    """Bytes of one device's temporaries in a chunk's step, by the cache's capacity."""
    steps = Engine(CONFIG, params, prefill_chunk=CHUNK)._steps
    found = {}
    for capacity in (4096, 16384, 65536):
        lowered = steps.lower(("prefill", CHUNK, capacity))
        found[capacity] = lowered.compile().memory_analysis().temp_size_in_bytes
    return found


def main(cases):
    report, alone = {}, {}
    for case in cases:
        text, slots = case.split("/")
        slots, mesh = int(slots), parse_mesh(text)
        shardings = param_shardings(model.param_specs(CONFIG), mesh, DECODE)
        params = {path: jax.device_put(leaf, shardings[path]) for path, leaf in PARAMS.items()}
        if slots not in alone:
            alone[slots] = answers(PARAMS, slots)
        ids, logprobs, states, calls, engine = answers(params, slots)
        keys = next(memory["k"] for stack in engine._cache.stacks for memory in stack
                    if "k" in memory)
        report[case] = {
            "ids": ids == alone[slots][0], "logprobs": peak_ratio(logprobs, alone[slots][1]),
            "states": max(map(peak_ratio, states, alone[slots][2])),
            "told": calls == alone[slots][3], "calls": calls,
            "key_share": keys.addressable_shards[0].data.size / keys.size,
            "temporaries": temporaries(params) if slots == 1 else None}
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1:])
