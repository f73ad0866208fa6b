"""Messages for people: on stderr, from process 0 alone, clear of a running progress bar."""

import sys

_process_index = 0
_prefix = ""


def set_process(index: int, prefix: str = "") -> None:
    """Tells which process this is: only process 0 speaks. `prefix` stands before what all say."""
    global _process_index, _prefix
    _process_index, _prefix = index, prefix


def prefix() -> str:
    return _prefix


def is_speaker() -> bool:
    return _process_index == 0


def note(text: str) -> None:
    """Writes a line to stderr, on process 0."""
    if is_speaker():
        write(text)


def warn(text: str) -> None:
    """Writes a line to stderr on every process: a record or a file at fault is known to one."""
    write(f"{_prefix}warning: {text}")


def fail(text: str) -> None:
    """Writes the sentence that a run ends with, on every process."""
    write(f"mmx: {_prefix}{text}")


def write(text: str) -> None:
    from mmx.obs.progress import active_bar

    bar = active_bar()
    if bar is None:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    else:
        bar.write(text, file=sys.stderr)
