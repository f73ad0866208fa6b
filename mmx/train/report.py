"""What a run says: one JSON line per report in the run's folder, and the same for people."""

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mmx.obs import log
from mmx.obs.progress import duration


class Meter:
    """Averages the metrics of finished steps between two reports."""

    def __init__(self, names, tokens_per_byte, tokens_per_step: int, flops_per_token: float = 0.0,
                 peak_flops: float = 0.0):
        self.names, self.tokens_per_byte = names, tokens_per_byte
        self.tokens_per_step = tokens_per_step
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.start()

    def start(self) -> None:
        """Begins a new span of steps."""
        self.began, self.steps, self.sums = time.monotonic(), 0, {}

    @contextlib.contextmanager
    def paused(self):
        """Leaves the time of what the loop does besides steps out of the rate."""
        at = time.monotonic()
        yield
        self.began += time.monotonic() - at

    def add(self, metrics: Mapping[str, np.ndarray]) -> None:
        self.steps += 1
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + np.asarray(value, np.float64)

    def record(self, step: int, learning_rate: float) -> dict:
        """The averages since `start` as a flat dict of plain numbers; starts again."""
        elapsed = max(time.monotonic() - self.began, 1e-9)
        rate = self.steps * self.tokens_per_step / elapsed
        out = {"step": step}
        for name in ("loss", "grad_norm", "balance", "dropped"):
            if name in self.sums:
                out[name] = float(self.sums[name] / self.steps)
        out["lr"] = learning_rate
        out["tokens_per_second"] = rate
        if self.peak_flops:
            out["mfu"] = rate * self.flops_per_token / self.peak_flops
        for i, name in enumerate(self.names):
            targets = float(self.sums["targets"][i])
            if targets:
                out.update(rates(name, float(self.sums["nll"][i]), targets,
                                 float(self.sums["right"][i]), self.tokens_per_byte[i]))
        self.start()
        return out


def rates(name: str, nll: float, targets: float, right: float, tokens_per_byte: float) -> dict:
    """Loss in nats per token, accuracy, and bits per byte where bytes are known (else NaN).

    The bits of the scored tokens are spread over all tokens of the source, so the first token of
    each document, which has no context to be scored in, counts as an average one.
    """
    loss = nll / targets
    out = {f"{name}/loss": loss, f"{name}/accuracy": right / targets}
    if math.isfinite(tokens_per_byte):
        out[f"{name}/bits_per_byte"] = loss / math.log(2) * tokens_per_byte
    return out


class Reporter:
    """Writes records to `metrics.jsonl` and to the console, on process 0."""

    def __init__(self, run: Path, steps: int, resumed_at: int):
        self.path, self.steps = run / "metrics.jsonl", steps
        if log.is_speaker():
            run.mkdir(parents=True, exist_ok=True)
            self._keep_until(resumed_at)

    def _keep_until(self, step: int) -> None:
        # Steps after the checkpoint are run again; their first records would stand twice.
        if self.path.exists():
            lines = self.path.read_text().splitlines()
            kept = [line for line in lines if _step_of(line) <= step]
            scratch = self.path.with_suffix(".tmp")
            scratch.write_text("".join(line + "\n" for line in kept))
            os.replace(scratch, self.path)

    def write(self, record: dict) -> None:
        if not log.is_speaker():
            return
        with open(self.path, "a") as file:
            file.write(json.dumps({name: _short(value) for name, value in record.items()}) + "\n")
        log.note(self._sentence(record))

    def _sentence(self, record: dict) -> str:
        parts = [f"step {record['step']:,}/{self.steps:,}"]
        if "loss" in record:
            parts += [f"loss {record['loss']:.4f}"]
        for name in dict.fromkeys(key.split("/")[0] for key in record if "/" in key):
            text = f"{name} {record[f'{name}/loss']:.3f}"
            if f"{name}/bits_per_byte" in record:
                text += f" ({record[f'{name}/bits_per_byte']:.3f} bits/byte)"
            parts.append(text + f" right {100 * record[f'{name}/accuracy']:.1f}%")
        if "loss" in record:
            rate = record["tokens_per_second"]
            parts += [f"grad {record['grad_norm']:.2f}", f"balance {record['balance']:.2f}",
                      f"lr {record['lr']:.2e}", f"{_count(rate)} tok/s"]
            if "dropped" in record:
                parts.append(f"dropped {100 * record['dropped']:.2f}%")
            if "mfu" in record:
                parts.append(f"mfu {100 * record['mfu']:.1f}%")
            if "tokens_left" in record and rate:
                parts.append(f"{duration(record['tokens_left'] / rate)} left")
        return "  ".join(parts)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line cut off by a kill


def _short(value):
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _count(value: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.2f}{unit}"
    return f"{value:.0f}"
