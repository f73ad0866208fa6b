"""The same geometry in transformers: a process of its own, started by `mmx.bench.turns`.

Reads one JSON object from stdin, {"config" (of config.json), "dtype", "seed", "method", "jobs"},
and writes a JSON line for each job: its samples, or its error.
"""

import json
import os
import sys
from functools import partial

# The timer's module imports jax, which must leave the accelerator to torch.
os.environ["JAX_PLATFORMS"] = "cpu"
# Weights are random and nothing is fetched; without a network every question to a hub is a wait.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from mmx.bench import records  # noqa: E402
from mmx.bench.timing import Method, Run, first_sentence, in_turns  # noqa: E402
from mmx.bench.whole import STEPS, Job  # noqa: E402


def main() -> None:
    """Answers stdin on stdout; whatever libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    asked = json.load(sys.stdin)
    jobs = [Job(**one) for one in asked["jobs"]]
    try:
        model = build(asked["config"], asked["dtype"], asked["seed"])
    except Exception as error:
        model, sentence = None, first_sentence(error)
    for job in jobs:
        timing = sentence if model is None else in_turns(
            {"": partial(run, model, job, asked["seed"])}, Method(**asked["method"]))[""]
        row = records.record(job.operation, job.shape, job.dims, asked["dtype"], "transformers",
                             timing, None)
        print(json.dumps(row), file=answers, flush=True)


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def build(config: dict, dtype: str, seed: int):
    """`MiniMaxForCausalLM` with random weights, born on the device in `dtype`."""
    import torch
    from transformers import MiniMaxConfig, MiniMaxForCausalLM

    torch.manual_seed(seed)
    fields = {name: value for name, value in config.items()
              if name not in ("architectures", "model_type", "transformers_version")}
    made = MiniMaxConfig(**fields, attn_implementation="sdpa")
    if hasattr(made, "_experts_implementation"):
        made._experts_implementation = "grouped_mm"
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device()):
            return MiniMaxForCausalLM(made).eval()
    finally:
        torch.set_default_dtype(before)


def run(model, job: Job, seed: int) -> Run:
    """A prompt in one piece, or STEPS decode steps on a cache that goes on growing."""
    import torch

    vocab = model.config.vocab_size
    source = torch.Generator(device()).manual_seed(seed)

    def ids(*shape):
        return torch.randint(0, vocab, shape, generator=source, device=device())

    def wait():
        if device() == "cuda":
            torch.cuda.synchronize()

    if job.operation == "prefill":
        prompt = ids(1, job.tokens)

        @torch.inference_mode()
        def call(count):
            for _ in range(count):
                out = model(prompt, use_cache=True, logits_to_keep=1)
                out.logits[:, -1].argmax(-1)
                del out
            wait()
        return Run(call)

    with torch.inference_mode():
        held = [model(ids(job.batch, job.tokens), use_cache=True, logits_to_keep=1).past_key_values]
    tokens = [ids(job.batch, 1) for _ in range(STEPS)]

    @torch.inference_mode()
    def steps(count):
        for _ in range(count):
            for token in tokens:
                out = model(token, past_key_values=held.pop(), use_cache=True)
                held.append(out.past_key_values)
                out.logits[:, -1].argmax(-1)
        wait()
    return Run(steps, STEPS)


if __name__ == "__main__":
    main()
