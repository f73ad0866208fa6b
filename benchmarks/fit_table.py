"""Which pods hold MiniMax-Text-01, for what: runs `mmx plan` for every row and writes docs/pods.md.

    python benchmarks/fit_table.py [--fresh] [--only=TEXT] [--jobs=2]

Rows already in benchmarks/results/pods.jsonl for the same command are kept unless --fresh; each
row's programs are compiled by the accelerator's own compiler and not run. A row has a process of
its own: a compiler that crashes costs its row, and starting one costs 2 s.
"""

import argparse
import collections
import concurrent.futures
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "pods.jsonl"
WHOLE = RESULTS.with_name("pods_whole.json")  # the last run of the whole table
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
    parser.add_argument("--jobs", type=int, default=2, help="rows at a time; one fills a core")
    parser.add_argument("--fresh", action="store_true", help="compile rows again that are there")
    args = parser.parse_args()
    known = {} if args.fresh and not args.only else read()
    wanted = [row for rows in TABLE.values() for row in rows if args.only in row
              and (args.fresh or row not in known)]
    wanted.sort(key=lambda row: "train" not in row)  # the longest first, so that none is left alone
    begin = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        running = [pool.submit(plan, row) for row in wanted]
        for number, done in enumerate(concurrent.futures.as_completed(running), 1):
            row, known[row] = done.result()
            write(RESULTS, "".join(
                json.dumps({"arguments": row, **known[row]}) + "\n"
                for rows in TABLE.values() for row in rows if row in known))
            print(f"{number}/{len(wanted)}  {row}: {told(known[row])}  "
                  f"({known[row]['cpu_s']:.0f} s of CPU, {known[row]['wall_s']:.0f} s; in all "
                  f"{time.perf_counter() - begin:.0f} s)", flush=True)
    if len(wanted) == sum(map(len, TABLE.values())):
        # Of the whole table in one go alone; a row made since then is told by its own commit.
        write(WHOLE, json.dumps({"wall_s": round(time.perf_counter() - begin), "jobs": args.jobs,
                                 "cores": os.cpu_count(), "command": "python " + " ".join(
                                     ["benchmarks/fit_table.py", *sys.argv[1:]])}) + "\n")
    write(PAGE, page(known, json.loads(WHOLE.read_text()) if WHOLE.is_file() else None))


def write(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".new")
    beside.write_text(text)
    beside.replace(path)


def read() -> dict[str, dict]:
    lines = RESULTS.read_text().splitlines() if RESULTS.is_file() else []
    return {row.pop("arguments"): row for row in map(json.loads, lines)}


def plan(row: str) -> tuple[str, dict]:
    command = [sys.executable, "-m", "mmx", "plan", "--model=text01", *row.split(), "--json"]
    begin = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=err)
        # wait4 tells what this one process used; its exit code is kept from Popen, so set it.
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        answer, said = out.read(), err.read().strip().splitlines()
    made = {"wall_s": round(time.perf_counter() - begin, 1),
            "cpu_s": round(used.ru_utime + used.ru_stime, 1),
            "peak_host_gib": round(used.ru_maxrss / 2**20, 2),
            "date": time.strftime("%Y-%m-%d"), "commit": commit()}
    if process.returncode not in (0, 3):
        why = next((line for line in reversed(said) if line.startswith("mmx: ")), None)
        if why is None:
            ended = (f"by signal {signal.Signals(-process.returncode).name}"
                     if process.returncode < 0 else f"with exit code {process.returncode}")
            why = f"the compiler ended {ended}: {' '.join(said[-1:])[:300]}"
        return row, {"refused": why, **made}
    found = json.loads(answer)
    estimate = found.get("estimate") or {}
    keep = ("pod", "devices", "mesh", "mode", "batch", "context", "chunk", "quantize", "kv_dtype",
            "fits", "limit_bytes", "bytes_per_device", "kernels", "versions", "compile_s")
    sent = sum(one["sent_bytes"] for one in found["collectives"])
    return row, {**{name: found[name] for name in keep}, "sent_bytes": sent,
                 "bound": estimate.get("bound"), "step_s": estimate.get("step_s"),
                 "tokens_per_s": estimate.get("tokens_per_s"), **made}


@functools.cache
def commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True,
                              check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "mmx", "pallas_kernels")
    return (git("rev-parse", "--short=10", "HEAD") or "unknown") + ("+changes" if changed else "")


def told(found: dict) -> str:
    if "refused" in found:
        return found["refused"]
    size = found["bytes_per_device"]["total"] / GIB
    return f"{'fits' if found['fits'] else 'does not fit'}, {size:.1f} GiB"


def page(known: dict[str, dict], whole: dict | None) -> str:
    lines = [
        "# Pods that hold MiniMax-Text-01", "",
        "Made by `python benchmarks/fit_table.py` from `mmx plan`: each row is the whole step of "
        "the real model (456 B parameters, RoPE, residual factors, experts, sampling), compiled by "
        "the accelerator's own compiler for that topology. **Compiled, not run.** The command of "
        "a row is `mmx plan --model=text01` with its arguments; GiB are of one device. The time "
        "of a step is an estimate from counts and data sheets (formulas: `--json`), a floor "
        "that no program reaches; it is bound by what is named beside it. The context is 8,192 "
        "where none is given. CPU is what compiling and reading a row took.", "",
        *made(known, whole), ""]
    for heading, rows in TABLE.items():
        lines += [f"## {heading}", "",
                  "| arguments | mesh | fits | GiB of | weights | keys, values | states | "
                  "temporaries | step at least | bound by | CPU |",
                  "|---|---|---|---|---|---|---|---|---|---|---|"]
        for row in rows:
            if row not in known:
                continue
            found = known[row]
            cpu = f"{found['cpu_s']:,.0f} s" if "cpu_s" in found else ""
            if "refused" in found:
                why = found["refused"].replace("|", "/")
                lines.append(f"| `{row}` | {why} | | | | | | | | | {cpu} |")
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
                f" | {size['temporaries']} | {step} | {found['bound'] or ''} | {cpu} |")
        lines.append("")
    return "\n".join(lines)


def made(known: dict[str, dict], whole: dict | None) -> list[str]:
    """What the rows were compiled from and with, how long it took, and the kernels in them."""
    rows = [found for row, found in known.items() if "commit" in found]
    if not rows:
        return ["These rows do not tell the commit that they were compiled from."]

    def several(values) -> str:
        return ", ".join(f"{value} ({count} rows)" if len(counts) > 1 else str(value)
                         for counts in [collections.Counter(values)]
                         for value, count in counts.most_common())

    packages = [" ".join(f"{name} {number}" for name, number in found["versions"].items())
                for found in rows if "versions" in found]
    lines = [f"Compiled from commit {several(found['commit'] for found in rows)} on "
             f"{several(found['date'] for found in rows)} with {several(packages)}. "
             f"{len(rows)} of {sum(map(len, TABLE.values()))} rows tell this; together they took "
             f"{sum(found['cpu_s'] for found in rows) / 60:.1f} core-minutes."
             + (f" The whole table last took {whole['wall_s'] / 60:.1f} minutes on "
                f"{whole['cores']} cores: `{whole['command']}`." if whole else ""), ""]
    forms: dict[tuple[str, str], list[str]] = {}
    for found in rows:
        if "kernels" in found and found["bound"]:
            chip = "H200" if "h200" in found["pod"] else "TPU"
            names = ", ".join(f"`{name}`" for name in found["kernels"])
            forms.setdefault((chip, found["mode"]), []).append(names or "none, XLA alone")
    lines += ["Kernels in the compiled programs ([kernels.md](kernels.md)); the rest is XLA:", ""]
    lines += [f"- {chip}, {mode}: {several(names)}"
              for (chip, mode), names in sorted(forms.items())]
    if any(chip == "H200" for chip, _ in forms):
        lines += ["", "On an H200 cuDNN runs the softmax layers; it builds its programs on a GPU "
                  "alone, so these rows have blocks in XLA in its place, which move more: the "
                  "times of long contexts are too high."]
    return lines


if __name__ == "__main__":
    main()
