"""Progress of a long loop: a bar with its estimated end on a terminal, log lines otherwise."""

import sys
import threading
import time

from mmx.obs import log

_REDRAW_SECONDS = 0.5
_active = None


def active_bar():
    """Returns the bar now on the screen, or None; lines are written above it."""
    return _active


class Progress:
    """Counts up to `total` of `unit`; on a terminal a bar, else a line every `every_s` seconds.

    Only process 0 shows anything. `done` is what an earlier run has finished: it counts towards
    the total and not towards the rate.
    """

    def __init__(self, total: int | None, unit: str, *, title: str = "", done: int = 0,
                 every_s: float = 10.0, stream=None):
        self.total, self.unit, self.title = total, unit, title
        self.count = self.first = done
        self._every_s = every_s
        self._stream = stream or sys.stderr
        self._shows = log.is_speaker()
        self._terminal = self._shows and self._stream.isatty()
        self._bar = None
        self._figures = ""
        self._written = -1

    def __enter__(self) -> "Progress":
        global _active
        self._start = self._last = time.monotonic()
        if self._terminal:
            from tqdm import tqdm

            self._bar = _active = tqdm(
                total=self.total, initial=self.first, desc=self.title or None, leave=False,
                unit=f" {self.unit}", file=self._stream, dynamic_ncols=True,
                unit_scale=self.unit == "parameters")
        return self

    def update(self, count: int = 1, **figures) -> None:
        """Adds `count`, which may be 0; `figures` (name=text) stand beside the rate until replaced.
        """
        self.count += count
        if figures:
            self._figures = "  ".join(f"{text} {name}" for name, text in figures.items())
        if self._bar is not None:
            if figures:
                self._bar.set_postfix_str(self._figures, refresh=False)
            if count:
                self._bar.update(count)
            elif time.monotonic() - self._last >= _REDRAW_SECONDS:
                self._last = time.monotonic()
                self._bar.refresh()
        elif self._shows and time.monotonic() - self._last >= self._every_s:
            self._last = time.monotonic()
            self._line()

    def reach(self, done: int, total: int) -> None:
        """Sets the count and the total: for callbacks that tell both."""
        if total != self.total:
            self.total = total
            if self._bar is not None:
                self._bar.total = total
        self.update(done - self.count)

    def __exit__(self, *exc_info) -> None:
        global _active
        if self._bar is not None:
            self._bar.close()
            _active = None
        elif self._shows and self._written >= 0 and self.count != self._written:
            self._line()

    def _line(self) -> None:
        self._written = self.count
        elapsed = time.monotonic() - self._start
        rate = (self.count - self.first) / elapsed if elapsed > 0 else 0.0
        text = f"{self.title}: " if self.title else ""
        text += f"{self.count:,}"
        if self.total:
            text += f" of {self.total:,} {self.unit} ({100 * self.count / self.total:.0f} %)"
        else:
            text += f" {self.unit}"
        text += f"  {rate:,.1f} {self.unit}/s"
        if self.total and rate > 0:
            text += f"  {duration((self.total - self.count) / rate)} left"
        self._stream.write(text + (f"  {self._figures}" if self._figures else "") + "\n")
        self._stream.flush()


def duration(seconds: float) -> str:
    """Writes a time span for people: "4 s", "3 min 20 s", "2 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Waiting:
    """Tells that one long step runs: its seconds count up on a terminal, else `title` is a line.

    A context; only process 0 shows anything.
    """

    def __init__(self, title: str, *, stream=None):
        self.title, self._stream, self._over = title, stream or sys.stderr, threading.Event()

    def __enter__(self) -> "Waiting":
        self._start, self._thread = time.monotonic(), None
        if log.is_speaker() and self._stream.isatty():
            self._thread = threading.Thread(target=self._draw, daemon=True)
            self._thread.start()
        else:
            log.note(self.title)
        return self

    def __exit__(self, *error) -> None:
        self._over.set()
        if self._thread:
            self._thread.join()
            self._stream.write("\r\x1b[K")  # the line is for the wait alone
            self._stream.flush()

    def _draw(self) -> None:
        while True:
            self._stream.write(f"\r\x1b[K{self.title} {time.monotonic() - self._start:.0f} s")
            self._stream.flush()
            if self._over.wait(1.0):
                return
