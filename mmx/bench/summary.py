"""The best of several runs in one short table: `python -m mmx.bench.summary DIR`.

DIR holds a folder for each run, each with the results.jsonl that `mmx bench --output` writes.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmx.bench import report


def best(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The quickest row of each operation, shape and dtype; a failure where none was measured.

    The same tokens unpacked, timed beside packed ones, are left out.
    """
    found: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        name = row["implementation"]
        if "passed" in row or row["operation"].startswith("ceiling_") or "/" in name:
            continue
        key = row["operation"], row["shape"], row["dtype"]
        if key not in found or "error" not in row and (
                "error" in found[key] or row["median_ms"] < found[key]["median_ms"]):
            found[key] = row
    return list(found.values())


def summary(folder: Path) -> str:
    """Returns the table, with a line for the comparisons; raises OSError for a folder not there."""
    rows = [json.loads(line) for path in sorted(folder.glob("*/results.jsonl"),
                                                key=lambda path: path.stat().st_mtime)
            for line in path.read_text().splitlines()]
    if not rows:
        return f"There is no result under {folder}."
    checks = [row for row in rows if "passed" in row]
    failed = [f"{row['operation'].removeprefix('check_')} {row['implementation']} {row['dtype']}"
              + ("" if row["failures"] else f" (stopped: {report.made(row)})")
              for row in checks if not row["passed"]]
    lines = [f"{rows[0]['device']['kind']}, commit {rows[0]['commit'][:12]}; the quickest of each:",
             "", report.table(best([row for row in rows if row["bench"] == "kernels"])),
             "", report.table(best([row for row in rows if row["bench"] != "kernels"]))]
    if checks:
        lines += ["", f"compared with float64: {len(checks) - len(failed)} of {len(checks)} passed"
                  + (f"; not passed: {', '.join(failed)}" if failed else "")]
    return "\n".join(lines).replace("\n\n\n", "\n\n").rstrip("\n")


def main(argv: Sequence[str]) -> int:
    """Prints the summary of one folder."""
    if len(argv) != 1 or not Path(argv[0]).is_dir():
        print("usage: python -m mmx.bench.summary DIR, a folder of runs", file=sys.stderr)
        return 2
    print(summary(Path(argv[0])))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
