"""Speed of mmx beside transformers on the same weights, machine and two CPU cores.

    python benchmarks/cpu_vs_transformers.py [--model=nano] [--rounds=5] [--json=FILE]

The model is exported to the transformers layout in float32. One process per library holds it; the
two take turns at each measurement, and medians are compared. Both run on the same two cores with
two threads. transformers is driven by the plainest loop there is (one forward call and one argmax
per token, its own cache), not by `generate`, whose checks cost it more; mmx by its engine, with all
it does per token for `mmx generate`. A cold start is a fresh `mmx generate` process, from its
launch to its first byte of text, with an empty and with a filled compilation cache.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CORES = 2
DECODE_TOKENS = 256
PROMPT_TOKENS = 16
PREFILL_TOKENS = 4096
ROOT = Path(__file__).resolve().parent.parent


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano",
                        help="a model directory or 'nano'; with --random only its geometry is used")
    parser.add_argument("--random", action="store_true", help="random weights instead")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--only", choices=("mmx", "transformers"), help="one side alone")
    parser.add_argument("--skip_cold_start", action="store_true")
    parser.add_argument("--worker", choices=("mmx", "transformers"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    for module in ("torch", "transformers") if args.only != "mmx" and not args.worker else ():
        if importlib.util.find_spec(module) is None:
            parser.error(f"{module} is not installed. Run pip install -e '.[parity]', or measure "
                         "mmx alone with --only=mmx.")
    if args.worker:
        serve(args.worker, args.model)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        python("export", args.model, args.random, model)
        report = measure(model, args)
        if not args.skip_cold_start:
            report["cold_start_s"] = cold_starts(model)
    show(report)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")


def python(*args):
    """Runs this file's `export` in its own process, so that the parent stays free of jax."""
    name, *values = args
    code = f"import benchmarks.cpu_vs_transformers as b; b.{name}(*{[str(v) for v in values]!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def export(name: str, random: str, directory: str):
    """Writes the model in the transformers layout, float32."""
    import mmx

    lm = mmx.load(name, random_weights=random == "True", dtype="float32")
    from mmx.checkpoint import locate, save_hf

    save_hf(directory, lm.config, lm.params, layout="transformers", dtype="float32",
            tokenizer_dir=locate("nano" if random == "True" else name))


def measure(model: Path, args) -> dict:
    sides = [args.only] if args.only else ["transformers", "mmx"]
    workers = {side: Worker(side, model) for side in sides}
    tasks = ("decode 1", "decode 8", "prefill")
    figures = {task: {side: [] for side in sides} for task in tasks}
    for worker in workers.values():  # compilation and first-touch costs stay out
        for task in tasks:
            worker.ask(task)
    for _ in range(args.rounds):
        for task in tasks:
            for side, worker in workers.items():
                figures[task][side].append(worker.ask(task))
    versions = {side: worker.ask("versions") for side, worker in workers.items()}
    for worker in workers.values():
        worker.close()
    report = {
        "command": "python benchmarks/cpu_vs_transformers.py", "rounds": args.rounds,
        "cores": CORES, "cpu": cpu_name(), "python": platform.python_version(),
        "load_average": os.getloadavg()[0], "versions": versions, "tokens_per_s": {}}
    for task in tasks:
        tokens = PREFILL_TOKENS if task == "prefill" else DECODE_TOKENS * int(task.split()[1])
        row = {side: tokens / statistics.median(seconds)
               for side, seconds in figures[task].items()}
        row["spread"] = {side: [tokens / max(s), tokens / min(s)]
                         for side, s in figures[task].items()}
        if len(sides) == 2:
            row["ratio"] = row["mmx"] / row["transformers"]
        report["tokens_per_s"][task] = row
    return report


class Worker:
    """A process that holds the model in one library and measures on demand."""

    def __init__(self, side: str, model: Path):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
               "OMP_NUM_THREADS": str(CORES), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, f"--worker={side}", f"--model={model}"], env=env, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, task: str):
        self.process.stdin.write(task + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended at '{task}'")
        return json.loads(line)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def serve(side: str, model: str):
    use_two_cores()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    runner = (MmxRunner if side == "mmx" else TransformersRunner)(model)
    for line in sys.stdin:
        name, *args = line.split()
        value = getattr(runner, name)(*map(int, args))
        print(json.dumps(value), file=answers, flush=True)


def use_two_cores():
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])


def prompt(batch: int, tokens: int, vocab: int) -> list[list[int]]:
    import numpy as np

    return np.random.default_rng(0).integers(3, vocab, (batch, tokens)).tolist()


class TransformersRunner:
    def __init__(self, model: str):
        import torch
        from transformers import MiniMaxForCausalLM

        torch.set_num_threads(CORES)
        self.torch = torch
        self.model = MiniMaxForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def versions(self):
        import transformers

        return {"torch": self.torch.__version__, "transformers": transformers.__version__,
                "threads": self.torch.get_num_threads()}

    def decode(self, batch: int) -> float:
        """Seconds for DECODE_TOKENS steps of `batch` rows after a short prompt."""
        torch = self.torch
        ids = torch.tensor(prompt(batch, PROMPT_TOKENS, self.model.config.vocab_size))
        with torch.inference_mode():
            out = self.model(ids, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            begin = time.perf_counter()
            for _ in range(DECODE_TOKENS):
                out = self.model(token, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[:, -1].argmax(-1, keepdim=True)
            token.tolist()
        return time.perf_counter() - begin

    def prefill(self) -> float:
        """Seconds from the prompt of PREFILL_TOKENS to the first token."""
        torch = self.torch
        ids = torch.tensor(prompt(1, PREFILL_TOKENS, self.model.config.vocab_size))
        with torch.inference_mode():
            begin = time.perf_counter()
            out = self.model(ids, use_cache=True, logits_to_keep=1)
            out.logits[:, -1].argmax(-1).tolist()
        return time.perf_counter() - begin


class MmxRunner:
    def __init__(self, model: str):
        import mmx

        self.lm = mmx.load(model, dtype="float32")
        self.engines = {}

    def versions(self):
        import jax

        import mmx

        return {"mmx": mmx.__version__, "jax": jax.__version__}

    def _run(self, slots: int, prompts, max_tokens: int):
        from mmx.engine import Request, SamplingParams

        if slots not in self.engines:
            self.engines[slots] = self.lm.engine(slots=slots)
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        return self.engines[slots].run(
            [Request(i, ids, sampling) for i, ids in enumerate(prompts)])

    def decode(self, batch: int) -> float:
        started, begin = set(), None
        for event in self._run(batch, prompt(batch, PROMPT_TOKENS, self.lm.config.vocab_size),
                               DECODE_TOKENS + 1):
            started.add(event.key)
            if begin is None and len(started) == batch:
                begin = time.perf_counter()
        return time.perf_counter() - begin

    def prefill(self) -> float:
        begin = time.perf_counter()
        for _ in self._run(1, prompt(1, PREFILL_TOKENS, self.lm.config.vocab_size), 1):
            pass
        return time.perf_counter() - begin


def cold_starts(model: Path) -> dict:
    """Seconds from launching `mmx generate` to its first byte of text."""
    with tempfile.TemporaryDirectory() as cache:
        return {"empty_cache": first_byte(model, cache), "filled_cache": first_byte(model, cache)}


def first_byte(model: Path, cache: str) -> float:
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache, "JAX_PLATFORMS": "cpu",
           "PYTHONPATH": str(ROOT)}
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "mmx", "generate", f"--model={model}", "--max_tokens=32",
         "--ignore_eos", "--prompt=The history of the river begins"],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, preexec_fn=use_two_cores)
    process.stdout.read(1)
    seconds = time.perf_counter() - begin
    process.stdout.read()
    if process.wait():
        raise RuntimeError("mmx generate failed")
    return seconds


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def show(report: dict):
    print(f"{report['cpu']}, {report['cores']} cores, medians of {report['rounds']}")
    for task, row in report["tokens_per_s"].items():
        cells = [f"{side} {row[side]:9.1f} tok/s" for side in ("transformers", "mmx")
                 if side in row]
        ratio = f"{row['ratio']:6.2f} x" if "ratio" in row else ""
        name = f"prefill {PREFILL_TOKENS}" if task == "prefill" else f"decode batch {task[7:]}"
        print(f"{name:16} {'  '.join(cells)} {ratio}")
    for name, seconds in report.get("cold_start_s", {}).items():
        print(f"first text after {seconds:5.1f} s ({name.replace('_', ' ')})")


if __name__ == "__main__":
    main()
