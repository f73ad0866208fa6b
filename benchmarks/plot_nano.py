"""Draw how nano was trained and what it recalls.

    python benchmarks/plot_nano.py

Reads the trainer's metrics, benchmarks/results/nano_train.jsonl, and what launch/nano/eval.py
measured, nano_eval.json. Writes docs/images/nano_training.png and nano_needle.png.
Needs matplotlib (the dev extra).
"""

import argparse
import json
import sys
from pathlib import Path

try:
    import matplotlib
except ImportError:
    print("plot_nano.py: matplotlib is not installed. Run: pip install matplotlib", file=sys.stderr)
    sys.exit(2)

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
TOKENS_PER_STEP = 64 * 2048
INK, BLUE, ORANGE, GREEN = "#333333", "#2c6fbb", "#d9762b", "#3a8f5c"


def draw_training(metrics: Path, target: Path) -> None:
    """Three panels against tokens: losses, bits per byte of prose, accuracy of recalled tokens."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    train = [row for row in rows if "loss" in row]
    held = [row for row in rows if "heldout/loss" in row]
    report = json.loads((metrics.parent / "nano_eval.json").read_text())
    xz = report["heldout"]["all_heldout_xz9"]

    def series(source, name, scale=1.0):
        return ([row["step"] * TOKENS_PER_STEP / 1e6 for row in source],
                [scale * row[name] for row in source])

    figure, (loss, bits, recall) = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    loss.plot(*series(train, "text/loss"), color=BLUE, label="prose")
    loss.plot(*series(train, "recall/loss"), color=ORANGE, label="recalled tokens")
    loss.set(title="Training loss", ylabel="nats per token", ylim=(0, 6))
    bits.plot(*series(train, "text/bits_per_byte"), color=BLUE, label="training text")
    bits.plot(*series(held, "heldout/bits_per_byte"), "o-", color=GREEN, markersize=5,
              label="held-out text")
    bits.axhline(xz, color=INK, linestyle="--", linewidth=1)
    bits.annotate("xz -9 on the held-out text", (1030, xz), ha="right",
                  va="bottom", textcoords="offset points", xytext=(0, 3), color=INK, fontsize=9)
    bits.set(title="Prose", ylabel="bits per byte", ylim=(0.7, 2.3))
    for source, name, style, color, label in (
            (train, "recall/accuracy", "-", ORANGE, "training, to 2,048"),
            (held, "recall_1x/accuracy", "o-", GREEN, "held out, to 2,048"),
            (held, "recall_4x/accuracy", "s--", BLUE, "held out, to 8,192")):
        tokens, right = series(source, name, 100)
        recall.plot(tokens, [100 - share for share in right], style, color=color, markersize=5,
                    label=label)
    recall.set(title="Recalled tokens that are wrong", ylabel="% (log scale)", yscale="log",
               ylim=(0.05, 100))
    recall.set_yticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
    for axis, place in ((loss, "upper right"), (bits, (0.42, 0.55)), (recall, "upper right")):
        axis.set(xlabel="million tokens", xlim=(0, 1060))
        axis.legend(frameon=False, fontsize=9, loc=place)
    _save(figure, target)


def draw_needles(results: Path, target: Path) -> None:
    """A heat map: share of found needles by depth, for each length and form of prompt."""
    report = json.loads(results.read_text())
    lines = []
    for part, note in (("needle", ""), ("needle_at_training_base", "\nrotary base 10,000")):
        for name, cell in report[part].items():
            form, length = name.rsplit("_", 1)
            if not note or cell["accuracy"] < 1:
                lines.append((f"{int(length):,} tokens, {form}{note}", cell["by_depth"]))
    depths = list(lines[0][1])
    shares = [[100 * cells[depth] for depth in depths] for _, cells in lines]
    figure, axis = plt.subplots(figsize=(8.5, 1.3 + 0.55 * len(lines)), layout="constrained")
    image = axis.imshow(shares, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
    for y, row in enumerate(shares):
        for x, share in enumerate(row):
            axis.text(x, y, f"{share:.0f}", ha="center", va="center", fontsize=9,
                      color="white" if share in (0, 100) else INK)
    axis.set_xticks(range(len(depths)), [depth.rstrip("%") for depth in depths])
    axis.set_yticks(range(len(lines)), [label for label, _ in lines])
    axis.set(title="Needles found, %", xlabel="depth of the needle, % (0 = first)")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    figure.colorbar(image, ax=axis, pad=0.02)
    _save(figure, target)


def _save(figure, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.stem + ".partial.png")
    figure.savefig(partial, dpi=130)
    partial.replace(target)
    print(target)


def main() -> None:
    """Draw both pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/images")
    args = parser.parse_args()
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False,
                         "axes.edgecolor": INK, "axes.titlesize": 11, "lines.linewidth": 1.6})
    draw_training(args.results / "nano_train.jsonl", args.out / "nano_training.png")
    draw_needles(args.results / "nano_eval.json", args.out / "nano_needle.png")


if __name__ == "__main__":
    main()
