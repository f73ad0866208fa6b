"""Writing a directory whole or not at all."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import jax


def write_json(path: Path, content: Mapping) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def beside(directory: Path) -> Path:
    """The hidden sibling in which `directory` is prepared."""
    return directory.with_name(f".{directory.name}.tmp")


def begin(directory: Path) -> Path:
    """Makes an empty `beside(directory)`; what an interrupted writer left there goes."""
    path = beside(directory)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def swap(directory: Path) -> None:
    """Renames `beside(directory)` to `directory`, replacing what is there."""
    old = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        os.rename(directory, old)
    os.rename(beside(directory), directory)
    shutil.rmtree(old, ignore_errors=True)


def barrier(name: str) -> None:
    """Waits for all processes of the job."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
