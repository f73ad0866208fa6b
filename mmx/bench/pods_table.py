"""Rows of `mmx.bench.pods` as one short table: `python -m mmx.bench.pods_table DIR`.

DIR holds a folder for each row with its results.jsonl, and the JSON files that
benchmarks/memory_vs_plan.py measured, whose plan was made ahead of time (`--plan`).
"""

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mmx.bench import report

PLAN = Path("benchmarks/results/h200/memory_plan.json")
WITHIN = 0.05  # of the plan
HEAD = ("what", "shape", "one", "all", "unit", "times", "bar", "")


def speeds(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A line for each thing that was measured on one device and on several."""
    lines, base = [], {}
    for row in rows:
        if row["bench"] != "pods" or "devices" not in row:
            continue
        key, failed = (row["operation"], row["shape"], row["geometry"]), "error" in row
        if row["devices"] == 1:
            base[key] = row
            if failed:
                lines.append((row["operation"], row["shape"], row["error"]))
            continue
        name = f"{row['operation']}, {row['implementation'].partition(', ')[2]}"
        if failed:
            lines.append((name, row["shape"], row["error"]))
            continue
        told, bar = "", row.get("must_reach")
        if bar and "speedup" in row:
            told = "reached" if row["speedup"] >= bar else "missed"
        one = base.get(key, {})
        lines.append((name, row["shape"],
                      report.figure(one["median_ms"]) if "median_ms" in one else "-",
                      report.figure(row["median_ms"]), "ms",
                      f"{row['speedup']:.3f}" if "speedup" in row else "-",
                      f"{bar:g}" if bar else "", told))
    return lines


def memory(measured: Mapping[str, Mapping], plan: Mapping[str, Mapping]) -> list[tuple[str, ...]]:
    """A line for each row that was run: the plan's GiB beside the allocator's."""
    lines = []
    for name, seen in measured.items():
        planned = plan.get(name, {}).get("bytes_per_device", {}).get("total")
        peak = seen.get("measured")
        if "error" in seen or peak is None:
            lines.append(("memory", name, seen.get("error", "this backend counts no bytes")))
            continue
        ratio = peak / planned if planned else None
        told = "" if ratio is None else "reached" if abs(ratio - 1) <= WITHIN else "missed"
        lines.append(("memory, plan and peak", name,
                      report.figure(planned / 2**30) if planned else "-",
                      report.figure(peak / 2**30), "GiB", f"{ratio:.3f}" if ratio else "-",
                      f"1 ± {WITHIN:g}", told))
    return lines


def summary(folder: Path, plan_file: Path = PLAN) -> str:
    """Returns the table, and what logits of several devices differ by from one's."""
    rows = [json.loads(line) for path in sorted(folder.glob("*/results.jsonl"),
                                                key=lambda path: path.stat().st_mtime)
            for line in path.read_text().splitlines()]
    measured: dict[str, Any] = {}
    for path in sorted(folder.glob("memory*.json"), key=lambda path: path.stat().st_mtime):
        measured |= json.loads(path.read_text())["measured"]
    plan = json.loads(plan_file.read_text())["plan"] if plan_file.is_file() else {}
    lines = speeds(rows) + memory(measured, plan)
    if not lines:
        return f"There is no result under {folder}."
    facts = next((f"{row['device']['kind']}, commit {row['commit'][:12]}" for row in rows), "")
    widths = [max(len(line[i]) for line in (HEAD, *lines) if len(line) == len(HEAD) or i < 2)
              for i in range(len(HEAD))]
    text = [facts, ""] if facts else []
    for line in (HEAD, *lines):
        cells = [f"{cell:<{width}}" if i in (0, 1, 4, 7) or len(line) < len(HEAD) else
                 f"{cell:>{width}}" for i, (cell, width) in enumerate(
                     zip(line, widths, strict=False))]
        text.append("  ".join(cells).rstrip()[:report.WIDTH])
    text += [f"logits of the prompt beside one device's: {row['difference']:.2g} of their norm"
             for row in rows if row.get("difference") is not None]
    return "\n".join(text)


def main(argv: list[str]) -> int:
    """Prints the table of one folder."""
    plans = [Path(word.partition("=")[2]) for word in argv if word.startswith("--plan=")]
    folders = [Path(word) for word in argv if not word.startswith("--")]
    if len(folders) != 1 or not folders[0].is_dir() or len(plans) + 1 != len(argv):
        print("usage: python -m mmx.bench.pods_table DIR [--plan=FILE]", file=sys.stderr)
        return 2
    print(summary(folders[0], *plans[:1]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
