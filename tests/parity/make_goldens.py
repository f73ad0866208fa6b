"""Writes tests/goldens/transformers.{json,npz}: what transformers computes for tests/parity/cases.

Run from the repository root, with the `parity` extra installed:

    python -m tests.parity.make_goldens

For each model and prompt length the first prompt seed is taken whose 64 greedy tokens have clear
margins (tests/tolerances.py) both in float64 and in transformers, and whose expert choices are no
near-ties, so that equality of tokens is a fair demand.
"""

import hashlib
import json
import platform
from pathlib import Path

import numpy as np

from mmx.config import ModelConfig
from tests import tiny
from tests.parity import cases
from tests.reference import Reference
from tests.tolerances import GREEDY_MARGIN, ROUTER_MARGIN, peak_ratio

GOLDENS = Path(__file__).parent.parent / "goldens"


def digest(weights: dict[str, np.ndarray]) -> str:
    """SHA-256 over names and float32 bytes, to tell changed weights from a changed model."""
    total = hashlib.sha256()
    for name in sorted(weights):
        total.update(name.encode() + weights[name].tobytes())
    return total.hexdigest()


def clear_prompt(config, weights, length: int) -> int:
    """The first prompt seed without near-ties in tokens or experts."""
    for seed in range(1000):
        reference = Reference(config, weights)
        _, margins = reference.greedy(cases.prompt(seed, length, config.vocab_size),
                                      cases.NEW_TOKENS)
        if margins.min() > GREEDY_MARGIN and reference.router_margin > ROUTER_MARGIN:
            return seed
    raise RuntimeError(f"No prompt of {length} tokens has clear margins.")


def main():
    import torch
    import transformers

    from tests.parity import torch_model

    arrays, entries = {}, {}
    for name in cases.CASES:
        hf = cases.hf_config(name)
        config = ModelConfig.from_hf(hf)
        weights = tiny.tensors(config, cases.WEIGHT_SEED)
        model = torch_model.build(hf, weights)
        prompts = {}
        for length in cases.LENGTHS:
            seed = clear_prompt(config, weights, length)
            prompt = cases.prompt(seed, length, config.vocab_size)
            ids, margins = torch_model.greedy(model, prompt, cases.NEW_TOKENS)
            reference = Reference(config, weights)
            expected = reference.extend(prompt)
            logits = torch_model.logits(model, prompt)
            assert ids == Reference(config, weights).greedy(prompt, cases.NEW_TOKENS)[0]
            assert margins.min() > GREEDY_MARGIN, margins.min()
            error = peak_ratio(logits, expected)
            print(f"{name} T={length} seed={seed}: transformers against float64 {error:.2g}, "
                  f"smallest margin {margins.min():.2g}", flush=True)
            arrays[f"{name}/{length}"] = logits[cases.kept_positions(length)]
            prompts[str(length)] = {"seed": seed, "greedy": ids,
                                    "smallest_margin": float(margins.min()),
                                    "error_to_float64": error}
        entries[name] = {"config": hf, "weights_sha256": digest(weights), "prompts": prompts}
    made_by = {"torch": torch.__version__, "transformers": transformers.__version__,
               "numpy": np.__version__, "python": platform.python_version(),
               "machine": platform.machine()}
    GOLDENS.mkdir(exist_ok=True)
    np.savez_compressed(GOLDENS / "transformers.npz", **arrays)
    text = json.dumps({"made_by": made_by, "cases": entries}, indent=1)
    (GOLDENS / "transformers.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
