"""Records as a table for a terminal of 100 columns, as Markdown, and as the files of a folder."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmx.batch.journal import write_text

WIDTH = 100
_SHORT = {"float32": "f32", "bfloat16": "bf16", "bfloat16/int8": "bf16/int8",
          "float32/int8": "f32/int8"}
Record = Mapping[str, Any]
MOST_KERNELS = 12  # that a terminal is shown of a trace; the files have all
_CACHED = ("Shares above 100 %: what was read stayed in a cache, which is faster than the copy of "
           "memory,\nor the device ran faster than while its ceilings were measured.")


def columns(rows: Sequence[Record]) -> list[str]:
    """Headings; tokens per second appear where a row has them."""
    names = ["operation", "shape", "dtype", "implementation", "ms", "spread", "floor ms", "share",
             "rate"]
    return names + (["tok/s"] if any("tokens_per_s" in row for row in rows) else [])


def cells(row: Record) -> list[str]:
    """One row's cells but the last, optional one; a failed row has its sentence after the names."""
    names = [row["operation"], row["shape"], _SHORT.get(row["dtype"], row["dtype"]),
             row["implementation"]]
    if "error" in row:
        return [*names, row["error"]]
    least = "floor_ms" in row
    return [*names, figure(row["median_ms"]), f"{100 * row['spread']:.0f} %",
            figure(row["floor_ms"]) if least else "", share(row) if least else "",
            f"{figure(row['rate'], 3)} {row['rate_unit']}",
            *([f"{row['tokens_per_s']:,.0f}"] if "tokens_per_s" in row else [])]


def share(row: Record) -> str:
    value = 100 * row["share_of_floor"]
    return f"{value:.0f} %" if value >= 9.95 else f"{value:.2g} %"


def figure(value: float, digits: int = 4) -> str:
    """Four digits, thousands set apart: "0.01234", "1.234", "12,345"."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.{digits}g}"


def made(row: Record) -> str:
    """A comparison's trials: "48", or "12 of 48" where it was stopped."""
    planned = row.get("planned", row["trials"])  # not in records of before
    return f"{row['trials']}" + (f" of {planned}" if row["trials"] < planned else "")


def check_cells(row: Record) -> list[str]:
    """One row of the comparison with float64."""
    verdict = ("passed" if row["passed"] else
               f"FAILED: {row['failures'][0]}" if row["failures"] else "stopped")
    return [row["operation"].removeprefix("check_"), _SHORT[row["dtype"]], row["implementation"],
            made(row), f"{row['worst']:.2g}", f"{row['limit']:g}", row["where"], verdict]


CHECK_COLUMNS = ["checked", "dtype", "implementation", "trials", "worst", "limit", "where",
                 "verdict"]


def heading(facts: Record) -> str:
    """What was measured on what, in a few lines."""
    device, found, rates = facts["device"], facts["versions"], facts.get("ceilings", {})
    place = f"{device['kind']}"
    if device["count"] > 1:
        place += f" (1 of {device['count']} devices used)"
    lines = [f"mmx bench {facts['bench']} on {place}", f"  {facts['geometry']}",
             "  " + ", ".join(f"{name} {found[name]}" for name in
                              ("mmx", "jax", "torch", "transformers") if name in found)
             + f", commit {facts['commit'][:12]}{facts['commit'][40:]}"]
    if rates:
        lines.append(f"  ceilings measured first: copy {figure(rates['copy_gb_per_s'])} GB/s, "
                     f"{rates['product_dtype']} product {figure(rates['product_tflop_per_s'])} "
                     "TFLOP/s")
    return "\n".join(textwrap.fill(line, WIDTH, subsequent_indent="    ") for line in lines)


def table(rows: Sequence[Record]) -> str:
    """Aligned text of at most 100 columns; a failure's sentence is cut, and whole in the files.

    The ceilings stand in the heading.
    """
    checks, rows = _split([row for row in rows if not row["operation"].startswith("ceiling_")])
    parts = []
    if checks:
        parts.append(_aligned([CHECK_COLUMNS, *map(check_cells, checks)], {3, 4, 5}, len(
            CHECK_COLUMNS)))
    if rows:
        names = columns(rows)
        parts.append(_aligned([names, *map(cells, rows)], set(range(4, len(names))), 4))
    if any(row.get("share_of_floor", 0) > 1 for row in rows):
        parts.append(_CACHED)
    parts += [_kernels(row, MOST_KERNELS) for row in rows if "busy_ms" in row]
    parts += [f"{row['operation']} {row['shape']}: {row['kernels_error']}" for row in rows
              if "kernels_error" in row]
    return "\n\n".join(parts)


def _kernels(row: Record, most: int | None = None) -> str:
    """What the device did in a step, by time; beyond `most` names their sum."""
    listed = row["kernels"][:most]
    told = [[figure(one["us_per_step"], 3), f"{one['us_per_step'] / row['busy_ms'] / 10:.0f} %",
             figure(one["per_step"], 3), figure(one["us"], 3), one["kernel"]] for one in listed]
    if rest := row["kernels"][len(listed):]:
        us, per_step = (sum(one[key] for one in rest) for key in ("us_per_step", "per_step"))
        told.append([figure(us, 3), f"{us / row['busy_ms'] / 10:.0f} %", figure(per_step, 3), "",
                     f"({len(rest)} others)"])
    names = ["µs", "share", "programs", "µs each", "program"]
    return (f"{row['operation']} {row['shape']}: {figure(row['busy_ms'])} ms busy of "
            f"{figure(row['median_ms'])}, {figure(row['launches'], 3)} programs\n"
            + _aligned([names, *told], {0, 1, 2, 3}, len(names)))


def _split(rows: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Comparisons, and what was timed."""
    checks = [row for row in rows if "passed" in row]
    return checks, [row for row in rows if "passed" not in row]


def _aligned(lines: Sequence[Sequence[str]], right: set[int], names: int) -> str:
    """Columns of one width, those in `right` flush right. A line of `names` + 1 cells has a
    sentence last, which counts for no width."""
    count = len(lines[0])
    widths = [max(len(line[i]) for line in lines
                  if i < len(line) and (i < names or len(line) != names + 1))
              for i in range(count)]
    text = []
    for line in lines:
        told = len(line) == names + 1
        one = " ".join(f"{cell:>{widths[i]}}" if i in right and not told else
                       f"{cell:<{widths[i]}}" for i, cell in enumerate(line)).rstrip()
        text.append(one if len(one) <= WIDTH else one[:WIDTH - 1] + "…")
    return "\n".join(text)


def markdown(facts: Record, rows: Sequence[Record]) -> str:
    """The same cells as Markdown tables, with the formula of each floor."""
    lines = [f"`{facts['command']}`", "", "```text", heading(facts), "```"]
    checks, rows = _split(rows)
    if checks:
        lines += ["", _line(CHECK_COLUMNS), _line(["---"] * len(CHECK_COLUMNS)),
                  *(_line(check_cells(row)) for row in checks)]
    if rows:
        names = [*columns(rows), "floor is"]
        lines += ["", _line(names), _line(["---" if i < 4 or i == len(names) - 1 else "---:"
                                           for i in range(len(names))])]
        for row in rows:
            line = cells(row)
            if "error" in row:
                line[-1] = f"failed: {line[-1]}"
            line += [""] * (len(names) - 1 - len(line)) + [row.get("floor_formula", "")]
            lines.append(_line(line))
        for row in rows:
            if "busy_ms" in row:
                lines += ["", "```text", _kernels(row), "```"]
    return "\n".join(lines) + "\n"


def _line(line: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"


class Report:
    """The rows of a run. With a folder its files are whole after every row, also when it is killed.

    `say` is called with the JSON line of each row as it comes.
    """

    def __init__(self, facts: dict[str, Any], folder: Path | None, say=None):
        self.facts, self.rows = facts, []
        self._folder, self._say = folder, say
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def add(self, rows: Sequence[Record]) -> None:
        for row in rows:
            self.rows.append({**row, **self.facts})
            if self._say is not None:
                self._say(json.dumps(self.rows[-1], ensure_ascii=False))
        if self._folder is not None and rows:
            write_text(self._folder / "results.jsonl", "".join(
                json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows))
            write_text(self._folder / "table.md", markdown(self.facts, self.rows))

    def text(self) -> str:
        return heading(self.facts) + "\n\n" + table(self.rows)

    @property
    def any_measured(self) -> bool:
        """True when something beyond the ceilings was measured or compared."""
        return any("error" not in row and not row["operation"].startswith("ceiling_")
                   for row in self.rows)
