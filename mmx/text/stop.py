"""Stop strings matched across the pieces of a stream."""

from collections.abc import Iterable

from mmx.errors import UserError


def check_stops(stops: str | Iterable[str]) -> tuple[str, ...]:
    """Returns stop strings as a tuple; one string counts as one stop.

    Raises UserError for an entry that is not a string or is empty.
    """
    stops = (stops,) if isinstance(stops, str) else tuple(stops)
    for stop in stops:
        if not isinstance(stop, str) or not stop:
            raise UserError(f"Stop string {stop!r} can not be used.",
                            "A stop string is a text of at least one character.",
                            "Remove it from the list of stop strings.")
    return stops


def held_length(text: str, targets: Iterable[str]) -> int:
    """Length of the longest suffix of `text` that begins, without completing, one of `targets`."""
    longest = 0
    for target in targets:
        for size in range(min(len(target) - 1, len(text)), longest, -1):
            if text.endswith(target[:size]):
                longest = size
                break
    return longest


class StopMatcher:
    """Cuts a stream of text at the first stop string, and never emits a part of one early.

    The occurrence that is complete first wins, the longer one when two end together, so the
    emitted text depends on the stream alone and not on how it was cut into pieces.
    `matched` is the stop string found, or None.
    """

    def __init__(self, stops: str | Iterable[str] = ()):
        self._stops = check_stops(stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> tuple[str, bool]:
        """Takes a piece; returns the text that is safe to show, and whether a stop was hit."""
        if self.matched is not None:
            return "", True
        text = self._held + text
        found = min(((start + len(stop), start, stop) for stop in self._stops
                     if (start := text.find(stop)) >= 0), default=None)
        if found is not None:
            _, start, self.matched = found
            self._held = ""
            return text[:start], True
        keep = len(text) - held_length(text, self._stops)
        self._held = text[keep:]
        return text[:keep], False

    def finish(self) -> str:
        """Returns what was held back; call once, when the stream ends without a stop."""
        held, self._held = self._held, ""
        return held
