"""Draw how nano was trained and what it recalls.

    python benchmarks/plot_nano.py

Reads benchmarks/results/nano_train.jsonl (the trainer's metrics) and nano_eval.json
(launch/nano/eval.py --json), writes docs/images/nano_training.png and nano_needle.png.
Needs matplotlib (the dev extra).
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
TOKENS_PER_STEP = 64 * 2048
INK, BLUE, ORANGE, GREEN = "#333333", "#2c6fbb", "#d9762b", "#3a8f5c"


def draw_training(metrics: Path, target: Path) -> None:
    """Three panels against tokens: losses, bits per byte of prose, accuracy of recalled tokens."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    train = [row for row in rows if "loss" in row]
    held = [row for row in rows if "heldout/loss" in row]
    xz = json.loads((metrics.parent / "nano_eval.json").read_text())["heldout"]

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
    bits.axhline(xz["xz9_bits_per_byte"], color=INK, linestyle="--", linewidth=1)
    bits.annotate("xz -9 on the held-out text", (1030, xz["xz9_bits_per_byte"]), ha="right",
                  va="bottom", textcoords="offset points", xytext=(0, 3), color=INK, fontsize=9)
    bits.set(title="Prose", ylabel="bits per byte", ylim=(0.7, 2.3))
    recall.plot(*series(train, "recall/accuracy", 100), color=ORANGE, label="training, to 2,048")
    recall.plot(*series(held, "recall_1x/accuracy", 100), "o-", color=GREEN, markersize=5,
                label="held out, to 2,048")
    recall.plot(*series(held, "recall_4x/accuracy", 100), "s--", color=BLUE, markersize=5,
                label="held out, to 8,192")
    recall.set(title="Recalled tokens that are right", ylabel="%", ylim=(0, 102))
    for axis, place in ((loss, "upper right"), (bits, (0.42, 0.55)), (recall, "lower right")):
        axis.set(xlabel="million tokens", xlim=(0, 1060))
        axis.legend(frameon=False, fontsize=9, loc=place)
    _save(figure, target)


def draw_needles(results: Path, target: Path) -> None:
    """One heat map per form of prompt: share of found needles by depth and length."""
    report = json.loads(results.read_text())
    forms: dict[str, dict[int, dict]] = {}
    for name, cell in report["needle"].items():
        form, length = name.rsplit("_", 1)
        forms.setdefault(form, {})[int(length)] = cell["by_depth"]
    rows = max(map(len, forms.values()))
    figure, axes = plt.subplots(1, len(forms), figsize=(11, 1.5 + 0.42 * rows), squeeze=False,
                                layout="constrained")
    for axis, (form, cells) in zip(axes[0], forms.items(), strict=True):
        lengths = sorted(cells)
        depths = list(cells[lengths[0]])
        shares = [[100 * cells[n][depth] for depth in depths] for n in lengths]
        image = axis.imshow(shares, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
        for y, line in enumerate(shares):
            for x, share in enumerate(line):
                axis.text(x, y, f"{share:.0f}", ha="center", va="center", fontsize=9,
                          color="white" if share in (0, 100) else INK)
        axis.set_xticks(range(len(depths)), [depth.rstrip("%") for depth in depths])
        axis.set_yticks(range(len(lengths)), [f"{n:,}" for n in lengths])
        axis.set(title=f"{form} prompt", xlabel="depth of the needle, %")
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    axes[0][0].set_ylabel("tokens")
    figure.colorbar(image, ax=axes[0].tolist(), label="found, %", pad=0.01)
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
