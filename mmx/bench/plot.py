"""Results as a picture: `python -m mmx.bench.plot DIR` draws plot.png from DIR/results.jsonl."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmx.errors import UserError

_COLORS = ("#2c6fbb", "#d9762b", "#3a8f5c", "#8a4fa3", "#b03a48", "#5b5b5b", "#c2a11f", "#2a9d9d")
_INK = "#333333"
# Bars end here: a share far above 100 % says only that a cache was measured.
_LONGEST = 150.0


def draw(rows: Sequence[Mapping[str, Any]], target: Path) -> None:
    """Draws the cost per token against the context, and the share of its floor of each row.

    Each panel is there when rows of its kind are. Raises UserError without matplotlib, or when
    there is nothing to draw.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError("The plot needs matplotlib, which is not installed.", "",
                        "Install it with: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    good = [row for row in rows if "floor_ms" in row]
    curves = [found for operation in ("context", "context_layers")
              if (found := [row for row in good if row["operation"] == operation])]
    bars = [row for row in good if not row["operation"].startswith("context")]
    if not good:
        raise UserError("There is nothing to draw.", "No row was measured.",
                        "The sentences of the failures are in the table.")
    names = list(dict.fromkeys(_plain(row["implementation"]) for row in good))
    colors = {name: _COLORS[i % len(_COLORS)] for i, name in enumerate(names)}
    heights = [4.2] * len(curves) + ([1.4 + 0.24 * len(bars)] if bars else [])
    with plt.rc_context({"axes.spines.top": False, "axes.spines.right": False,
                         "axes.edgecolor": _INK, "axes.titlesize": 11}):
        figure, axes = plt.subplots(len(heights), 1, figsize=(9, sum(heights)), squeeze=False,
                                    height_ratios=heights, layout="constrained")
        panels = [axis for (axis,) in axes]
        for axis, curve in zip(panels, curves, strict=False):
            _curve(axis, curve, colors)
        if bars:
            _bars(panels[-1], bars, colors)
        device = rows[0]["device"]["kind"]
        figure.suptitle(f"mmx bench {rows[0]['bench']} on {device}", fontsize=12)
        partial = target.with_name(f".{target.name}.partial")
        figure.savefig(partial, dpi=130, format="png")
        plt.close(figure)
    os.replace(partial, target)


def _curve(axis, rows, colors) -> None:
    ticks = sorted({row["dims"]["tokens"] for row in rows})
    for name, color in colors.items():
        line = sorted((row["dims"]["tokens"], row["median_ms"] * 1e3 / row["dims"]["tokens"])
                      for row in rows if row["implementation"] == name)
        if line:
            axis.plot(*zip(*line, strict=True), "o-", color=color, label=name, markersize=5)
    least = sorted({(row["dims"]["tokens"], row["floor_ms"] * 1e3 / row["dims"]["tokens"])
                    for row in rows})
    axis.plot(*zip(*least, strict=True), "--", color=_INK, linewidth=1, label="floor")
    dims = rows[0]["dims"]
    what = (f"{dims['layers']} lightning layers with their projections, chunks of "
            f"{max(row['dims']['chunk'] for row in rows):,}" if "layers" in dims else
            "Lightning attention forward, one layer")
    axis.set(title=f"{what}: {dims['heads']} heads of {dims['head_dim']}, {rows[0]['dtype']}",
             xlabel="context, tokens (log scale)",
             ylabel="cost per token, µs", xscale="log", ylim=(0, None))
    axis.set_xticks(ticks, [f"{one:,}" for one in ticks])
    axis.minorticks_off()
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.legend(frameon=False, fontsize=9)


def _bars(axis, rows, colors) -> None:
    shares = [100 * row["share_of_floor"] for row in rows]
    ends, places = [min(one, _LONGEST) for one in shares], range(len(rows))
    axis.axvline(100, color=_INK, linestyle="--", linewidth=1, zorder=0)
    bars = axis.barh(places, ends, color=[colors[_plain(row["implementation"])] for row in rows],
                     height=0.7)
    for bar, row in zip(bars, rows, strict=True):
        bar.set_alpha(1.0 if _plain(row["implementation"]) == row["implementation"] else 0.5)
    for place, end, value in zip(places, ends, shares, strict=True):
        axis.text(end + 1, place, f"{value:.2g} %" if value < 9.95 else f"{value:.0f} %",
                  va="center", fontsize=8, color=_INK,
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    axis.set_yticks(places, [f"{row['operation']} {row['shape']}  {row['implementation']}"
                             for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set(title="Share of the floor (least time / measured time)", xlabel="%",
             xlim=(0, max(100.0, *ends) * 1.08), ylim=(len(rows) - 0.4, -0.6))


def _plain(name: str) -> str:
    """The implementation without what it was given: both have one colour."""
    return name.partition("/")[0]


def main(argv: Sequence[str]) -> int:
    """Draws again what a run has written, for example on a machine that has matplotlib."""
    if len(argv) != 1 or not (Path(argv[0]) / "results.jsonl").is_file():
        print("usage: python -m mmx.bench.plot DIR, with DIR/results.jsonl", file=sys.stderr)
        return 2
    folder = Path(argv[0])
    try:
        draw([json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()],
             folder / "plot.png")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(folder / "plot.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
