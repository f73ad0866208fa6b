"""transformers' model with given weights; the only file of the tests that imports torch."""

import numpy as np
import torch
from transformers import MiniMaxConfig, MiniMaxForCausalLM

from tests import tiny

# Two threads that wait for each other and for jax's are ten times slower at these sizes.
torch.set_num_threads(1)


def build(hf_config: dict, weights: dict[str, np.ndarray]) -> MiniMaxForCausalLM:
    """A float32 `MiniMaxForCausalLM` holding `weights` (original layout)."""
    model = MiniMaxForCausalLM(MiniMaxConfig(**hf_config)).to(torch.float32).eval()
    state = {name: torch.from_numpy(x) for name, x in tiny.to_transformers(weights).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    tables = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
    missing = [name for name in missing if not name.endswith(tables)]
    assert not missing and not unexpected, (missing, unexpected)
    return model


@torch.no_grad()
def logits(model, ids) -> np.ndarray:
    """Float32 logits [T, V] of one sequence, without a cache."""
    return model(torch.as_tensor(np.asarray(ids))[None], use_cache=False).logits[0].numpy()


def greedy(model, prompt, count: int):
    """(ids, margins) of `count` uncached argmax steps; see `Reference.greedy`."""
    ids, margins = list(prompt), []
    for _ in range(count):
        last = logits(model, ids)[-1]
        second, best = np.sort(last)[-2:]
        margins.append((best - second) / np.abs(last).max())
        ids.append(int(last.argmax()))
    return ids[len(prompt):], np.array(margins)
