"""What makes a batch exact: a journal per host, a state file, and the merge into the output.

`OUT.partial-H` holds host H's finished records in the order they finished, each as one JSON line
`{"index": i, "record": {…}}`. `OUT.state.json` says which input and settings they belong to.
Process 0 merges the journals, in input order, into OUT and removes them; the state stays, so that
the same command again finds the work done.
"""

import fcntl
import glob
import json
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmx.errors import UserError
from mmx.obs import log

_SYNC_RECORDS = 16
_SYNC_SECONDS = 2.0


def dumps(record: Any) -> str:
    """One compact JSON line; the same record gives the same text in every run."""
    return json.dumps(record, ensure_ascii=False, separators=(", ", ": "))


def journal_path(output: Path, host: int) -> Path:
    return output.with_name(f"{output.name}.partial-{host}")


def journal_paths(output: Path) -> list[Path]:
    """All hosts' journals, those of an earlier run on more hosts too."""
    return _matching(output, ".partial-")


def _matching(path: Path, suffix: str) -> list[Path]:
    return sorted(map(Path, glob.glob(f"{glob.escape(f'{path}{suffix}')}*")))


def state_path(output: Path) -> Path:
    return output.with_name(output.name + ".state.json")


def _beside(path: str | os.PathLike) -> Path:
    """A name of its own: hosts of one file system may have equal process ids."""
    return Path(f"{os.fspath(path)}.tmp-{uuid.uuid4().hex[:12]}")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a file whole or not at all: beside its name, then renamed."""
    beside = _beside(path)
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def entries(path: Path) -> Iterator[tuple[int, int, int]]:
    """Yields (index, start, end) in bytes of each whole line, up to the first torn one."""
    with open(path, "rb") as file:
        start = 0
        for line in file:
            try:
                index = json.loads(line)["index"] if line.endswith(b"\n") else None
            except (ValueError, TypeError, KeyError):
                index = None
            if not isinstance(index, int):
                return
            yield index, start, start + len(line)
            start += len(line)


class Journal:
    """One host's finished records, appended so that a killed process loses at most the last line.

    Opening cuts off a torn last line. A second process that opens the same journal is refused.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = open(path, "ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise UserError(f"Another process is writing '{path}'.",
                            "One process at a time works on a host's share of a batch.",
                            "Wait for it, or stop it.") from None
        whole = max((end for _, _, end in entries(path)), default=0)
        if whole < self._file.tell():
            self._file.truncate(whole)
        self._unsynced = 0
        self._synced_at = time.monotonic()

    def append(self, index: int, record: Mapping[str, Any]) -> None:
        """Hands a record to the operating system; it reaches the disk within a small group."""
        self._file.write(dumps({"index": index, "record": record}).encode() + b"\n")
        self._file.flush()
        self._unsynced += 1
        if (self._unsynced >= _SYNC_RECORDS
                or time.monotonic() - self._synced_at > _SYNC_SECONDS):
            self.sync()

    def sync(self) -> None:
        os.fsync(self._file.fileno())
        self._unsynced, self._synced_at = 0, time.monotonic()

    def close(self) -> None:
        if not self._file.closed:
            self.sync()
            self._file.close()


def finished(output: Path) -> set[int]:
    """Returns the indexes that some host's journal holds."""
    return {index for path in journal_paths(output) for index, _, _ in entries(path)}


class Tally:
    """Counts the records of all journals; what was counted once is not read again."""

    def __init__(self, output: Path):
        self._output = output
        self._places: dict[Path, tuple[int, int]] = {}

    def count(self) -> int:
        for path in journal_paths(self._output):
            at, lines = self._places.get(path, (0, 0))
            with open(path, "rb") as file:
                file.seek(at)
                while data := file.read(1 << 20):
                    at, lines = at + len(data), lines + data.count(b"\n")
            self._places[path] = at, lines
        return sum(lines for _, lines in self._places.values())


def merge(output: Path, indexes: Iterable[int]) -> None:
    """Writes the records of `indexes`, in that order, to `output`: whole or not at all.

    A record that two journals hold (a run went on with another number of hosts) is taken once.
    Raises KeyError for an index in no journal.
    """
    places: dict[int, tuple[Path, int, int]] = {}
    for path in journal_paths(output):
        for index, start, end in entries(path):
            places.setdefault(index, (path, start, end))
    sources = {}
    beside = _beside(output)
    try:
        with open(beside, "w", encoding="utf-8") as merged:
            for index in indexes:
                path, start, end = places[index]
                if path not in sources:
                    sources[path] = open(path, "rb")
                sources[path].seek(start)
                merged.write(dumps(json.loads(sources[path].read(end - start))["record"]) + "\n")
            merged.flush()
            os.fsync(merged.fileno())
        os.replace(beside, output)
    finally:
        beside.unlink(missing_ok=True)
        for file in sources.values():
            file.close()


def claim(output: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """Binds the output to an input and settings, or checks that it is bound to the same.

    `state` holds `input_sha256`, `settings`, a flat mapping of what determines the results, and
    maybe `may_change`, another of what does not: a change there is told. Returns the state on disk.
    Raises UserError when it differs or the output is another's.
    """
    path = state_path(output)
    if not path.exists():
        if output.exists():
            raise UserError(f"The output '{output}' exists and no batch state belongs to it.",
                            "A file that this command did not write is not overwritten.",
                            "Name another --output, or discard it with --restart.")
        _create(path, state)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        before, now, free, now_free = map(dict, (
            found["settings"], json.loads(json.dumps(state["settings"])),
            found.get("may_change", {}), state.get("may_change", {})))
        digest = found["input_sha256"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"'{path}' is not a batch's state.", "It is written by this command.",
                        "Discard what was done with --restart.") from None
    if digest != state["input_sha256"]:
        raise UserError(f"The input is not the one that '{output}' was begun with.",
                        "A batch goes on only with the same input file.",
                        "Restore it, name another --output, or discard what was done with "
                        "--restart.")
    # Older states hold all in one mapping, and None for a dtype that the device decided.
    free |= {name: before.pop(name) for name in now_free if name in before}
    if "dtype" in now and before.get("dtype") is None:
        before["dtype"] = now["dtype"]
    if moved := _differences(free, now_free or free):
        log.note(f"since '{output}' was begun, {'; '.join(moved)}: what is done stays")
    if changed := _differences(before, now):
        raise UserError(f"The settings are not those that '{output}' was begun with: "
                        f"{'; '.join(changed)}.",
                        "A batch goes on only with the settings that its results depend on.",
                        "Restore them, name another --output, or discard what was done with "
                        "--restart.")
    return found


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
            for name in sorted({*before, *now}) if before.get(name) != now.get(name)]


def _create(path: Path, state: Mapping[str, Any]) -> None:
    """Writes the state unless another host did so first; all hosts then read the same one."""
    beside = _beside(path)
    write_text(beside, json.dumps(state, ensure_ascii=False, indent=1) + "\n")
    try:
        os.link(beside, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def tidy(output: Path) -> None:
    """Removes the journals of a finished output, and what a killed process left half-written."""
    for path in [*journal_paths(output), *_matching(output, ".tmp-"),
                 *_matching(state_path(output), ".tmp-")]:
        path.unlink(missing_ok=True)


def discard(output: Path) -> None:
    """Removes the output with everything that an earlier run left beside it."""
    tidy(output)
    for path in (output, state_path(output)):
        path.unlink(missing_ok=True)
