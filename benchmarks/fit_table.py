"""Which pods hold MiniMax-Text-01, for what: runs `mmx plan` for every row and writes docs/pods.md.

    python benchmarks/fit_table.py [--only=TEXT] [--jobs=2]

Rows already in benchmarks/results/pods.jsonl for the same command are kept unless --fresh; each
row's programs are compiled by the accelerator's own compiler and not run.
"""

import argparse
import concurrent.futures
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "pods.jsonl"
PAGE = ROOT / "docs" / "pods.md"
GIB = 2**30
MILLION, FOUR_MILLION = 1 << 20, 1 << 22

# Heading -> argument rows.
TABLE = {
    "Decoding, bfloat16": [
        "--pod=v5p:2x2x4 --batch=32", "--pod=v6e:4x8 --batch=32", "--pod=v5e:8x8 --batch=64",
        "--pod=tpu7x:2x2x2 --batch=32", "--pod=tpu7x:2x2x4 --batch=32", "--pod=h200:1x8 --batch=32",
        "--pod=v6e:8x8 --batch=64 --context=32768",
    ],
    "Decoding, int8 weights": [
        "--pod=v6e:4x4 --batch=16 --quantize=int8", "--pod=v6e:4x8 --batch=64 --quantize=int8",
        "--pod=v5p:2x2x2 --batch=16 --quantize=int8", "--pod=v5e:8x8 --batch=64 --quantize=int8",
        "--pod=tpu7x:2x2x2 --batch=32 --quantize=int8",
        "--pod=h200:1x4 --batch=16 --quantize=int8", "--pod=h200:1x8 --batch=64 --quantize=int8",
    ],
    "Chunks of prompts": [
        "--pod=v5p:2x2x4 --mode=prefill --batch=4 --context=32768",
        "--pod=v6e:4x8 --mode=prefill --batch=4 --context=32768",
        "--pod=v5e:8x8 --mode=prefill --batch=8 --context=32768",
        "--pod=h200:1x8 --mode=prefill --batch=4 --context=32768",
        "--pod=v6e:4x4 --mode=prefill --batch=2 --context=32768 --quantize=int8",
        "--pod=v5p:2x2x2 --mode=prefill --batch=2 --context=32768 --quantize=int8",
    ],
    "One prompt of 1,048,576 tokens": [
        f"--pod={pod} --mode=long --context={MILLION} --chunk=8192{more}" for pod, more in (
            ("v6e:4x8", ""), ("v5e:8x8", ""), ("v5p:2x2x4", ""), ("h200:1x8", ""),
            ("v6e:4x4", " --quantize=int8"), ("v5p:2x2x2", " --quantize=int8"),
            ("v5e:4x8", " --quantize=int8"), ("h200:1x4", " --quantize=int8"))
    ],
    "One prompt of 4,194,304 tokens": [
        f"--pod={pod} --mode=long --context={FOUR_MILLION} --chunk=8192{more}" for pod, more in (
            ("v6e:4x8", ""), ("v6e:8x8", ""), ("v5p:2x2x4", ""), ("h200:2x8", ""),
            ("v6e:4x4", " --quantize=int8"), ("v5p:2x2x2", " --quantize=int8"),
            ("v6e:4x4", " --quantize=int8 --kv_dtype=float8_e4m3fn"),
            ("h200:1x8", " --quantize=int8"))
    ],
    "Training on rows of 4,096 tokens, AdamW with float32 moments": [
        "--pod=v5p:8x8x4 --mode=train --batch=64 --context=4096",
        "--pod=v5p:16x16x16 --mode=train --batch=512 --context=4096",
    ],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="rows whose arguments contain this text")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--fresh", action="store_true", help="compile rows again that are there")
    args = parser.parse_args()
    known = {} if args.fresh and not args.only else read()
    wanted = [row for rows in TABLE.values() for row in rows if args.only in row
              and (args.fresh or row not in known)]
    begin = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for number, (row, found) in enumerate(pool.map(plan, wanted), 1):
            known[row] = found
            RESULTS.write_text("".join(
                json.dumps({"arguments": row, **known[row]}) + "\n"
                for rows in TABLE.values() for row in rows if row in known))
            print(f"{number}/{len(wanted)}  {row}: {told(found)}  "
                  f"({time.perf_counter() - begin:.0f} s)", flush=True)
    PAGE.write_text(page(known))


def read() -> dict[str, dict]:
    lines = RESULTS.read_text().splitlines() if RESULTS.is_file() else []
    return {row.pop("arguments"): row for row in map(json.loads, lines)}


def plan(row: str) -> tuple[str, dict]:
    command = [sys.executable, "-m", "mmx", "plan", "--model=text01", *row.split(), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 3):
        return row, {"refused": done.stderr.strip().splitlines()[-1]}
    found = json.loads(done.stdout)
    estimate = found.get("estimate") or {}
    keep = ("pod", "devices", "mesh", "mode", "batch", "context", "chunk", "quantize", "kv_dtype",
            "fits", "limit_bytes", "bytes_per_device", "compile_s")
    sent = sum(one["sent_bytes"] for one in found["collectives"])
    return row, {**{name: found[name] for name in keep}, "sent_bytes": sent,
                 "bound": estimate.get("bound"), "step_s": estimate.get("step_s"),
                 "tokens_per_s": estimate.get("tokens_per_s")}


def told(found: dict) -> str:
    if "refused" in found:
        return found["refused"]
    size = found["bytes_per_device"]["total"] / GIB
    return f"{'fits' if found['fits'] else 'does not fit'}, {size:.1f} GiB"


def page(known: dict[str, dict]) -> str:
    lines = [
        "# Pods that hold MiniMax-Text-01", "",
        "Made by `python benchmarks/fit_table.py` from `mmx plan`: each row is the whole step of "
        "the real model (456 B parameters, RoPE, residual factors, experts, sampling), compiled by "
        "the accelerator's own compiler for that topology. **Compiled, not run.** The command of "
        "a row is `mmx plan --model=text01` with its arguments; GiB are of one device. The time "
        "of a step is an estimate from counts and data sheets (formulas: `--json`), a floor "
        "that no program reaches; it is bound by what is named beside it. The context is 8,192 "
        "where none is given.", ""]
    for heading, rows in TABLE.items():
        lines += [f"## {heading}", "",
                  "| arguments | mesh | fits | GiB of | weights | keys, values | states | "
                  "temporaries | step at least | bound by |",
                  "|---|---|---|---|---|---|---|---|---|---|"]
        for row in rows:
            if row not in known:
                continue
            found = known[row]
            if "refused" in found:
                lines.append(f"| `{row}` | {found['refused']} | | | | | | | | |")
                continue
            size = {name: f"{value / GIB:.2f}" for name, value in
                    found["bytes_per_device"].items()}
            mesh = " ".join(f"{name} {n}" for name, n in found["mesh"].items())
            step = f"{found['step_s'] * 1e3:,.1f} ms" if found["step_s"] else ""
            lines.append(
                f"| `{row}` | {mesh} | {'yes' if found['fits'] else '**no**'} | "
                f"{size['total']} of {found['limit_bytes'] / GIB:.2f} | {size['weights']} | "
                f"{size['keys_values']} | "
                f"{size['states'] if found['mode'] != 'train' else size['optimizer'] + ' (Adam)'}"
                f" | {size['temporaries']} | {step} | {found['bound'] or ''} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
