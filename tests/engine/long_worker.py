"""The engine over eight simulated devices beside one device: long prompts; prints JSON.

Cases: MESH/SLOTS[/all], with all requests instead of two; MESH/ROWS/moves.
"""

import json
import math
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
from mmx.parallel import rows
from mmx.parallel.mesh_ops import MeshOps
from mmx.sharding.mesh import parse_mesh
from mmx.sharding.rules import DECODE, param_shardings
from tests.engine.conftest import tiny_model
from tests.tolerances import peak_ratio

CONFIG, PARAMS = tiny_model((LIGHTNING, SOFTMAX) * 2)
rows.BLOCK = 64  # several blocks travel
CHUNK = 512
RANDOM = np.random.default_rng(7)
# One prompt of many chunks among short ones, so that its row moves into a batch that decodes; the
# last makes the cache grow while others run.
LENGTHS = (512, 1536, 3, 90, 2600)
REQUESTS = [
    Request(number, RANDOM.integers(10, 90, length).tolist(), SamplingParams(
        max_tokens=9 if length < 1000 else 5, logprobs=3, ignore_eos=True,
        repetition_penalty=1.0 + 0.1 * (number == 1)))
    for number, length in enumerate(LENGTHS)]


def answers(params, slots: int, everything: bool):
    """Ids and log-probabilities of each request, the states left behind, calls of `told`."""
    requests = REQUESTS if everything else REQUESTS[:2]
    capacity, calls = None if everything else 2048, []
    engine = Engine(CONFIG, params, slots=slots, capacity=capacity, prefill_chunk=CHUNK)
    found = {event.key: event.result for event in engine.run(
        requests, lambda *told: calls.append(told)) if event.result is not None}
    states = [np.asarray(memory["state"]) for stack in engine._cache.stacks for memory in stack
              if "state" in memory]
    results = [found[request.key] for request in requests]
    return ([result.ids for result in results],
            np.asarray([one.logprob for result in results for one in result.logprobs]),
            states, calls, engine)


def moves(text: str, B: int, S: int = 240, tokens: int = 100) -> bool:
    """A row among others and a cache that grew hold what they held, wherever their keys lie."""
    ops, axes = MeshOps(parse_mesh(text), DECODE), (None, "batch", "kv_heads", "cache_time", None)

    def pieces(rows, slots):
        entry = ops.spec((2, rows, 2, slots, 4), *axes)[3]
        names = () if entry is None else (entry,) if isinstance(entry, str) else entry
        return math.prod(ops.mesh.shape[name] for name in names)

    def stored(x):
        """Slots in the order in which devices hold them: position p on device p mod W."""
        W = pieces(x.shape[1], x.shape[3])
        x = np.moveaxis(x.reshape(*x.shape[:3], -1, W, 4), 4, 3).reshape(x.shape)
        return jax.device_put(x, ops.sharding(x.shape, *axes))

    def read(x):
        W = pieces(x.shape[1], x.shape[3])
        return np.moveaxis(np.asarray(x).reshape(*x.shape[:3], W, -1, 4), 3, 4).reshape(x.shape)

    big, one = (RANDOM.standard_normal((2, rows, 2, S, 4)).astype(np.float32) for rows in (B, 1))
    slot = B - 1
    put = jax.jit(lambda *arrays: ops.write_row(*arrays, *axes))
    got = read(put(stored(big), stored(one), np.int32(slot), np.int32(tokens)))
    same = np.array_equal(got[:, :slot], big[:, :slot])
    same &= np.array_equal(got[:, slot, :, :tokens], one[:, 0, :, :tokens])
    grown = read(jax.jit(lambda x: ops.grow(x, 2 * S, *axes))(stored(big)))
    return bool(same and np.array_equal(grown[..., :S, :], big) and not grown[..., S:, :].any())


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
        text, slots, *rest = case.split("/")
        slots, everything = int(slots), "all" in rest
        if "moves" in rest:
            report[case] = moves(text, slots)
            continue
        mesh, key = parse_mesh(text), (slots, everything)
        shardings = param_shardings(model.param_specs(CONFIG), mesh, DECODE)
        params = {path: jax.device_put(leaf, shardings[path]) for path, leaf in PARAMS.items()}
        if key not in alone:
            alone[key] = answers(PARAMS, *key)
        ids, logprobs, states, calls, engine = answers(params, *key)
        keys = next(memory["k"] for stack in engine._cache.stacks for memory in stack
                    if "k" in memory)
        report[case] = {
            "ids": ids == alone[key][0], "logprobs": peak_ratio(logprobs, alone[key][1]),
            "states": max(map(peak_ratio, states, alone[key][2])),
            "told": calls == alone[key][3], "calls": calls,
            "key_share": keys.addressable_shards[0].data.size / keys.size,
            "key_bytes": keys.dtype.itemsize * keys.size // keys.shape[3],
            "temporaries": temporaries(params) if slots == 1 and everything else None}
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1:])
