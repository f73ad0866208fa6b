"""Which directories a checkpoint may be written to, or take the place of."""

import os
import re
from pathlib import Path

from mmx.checkpoint.hf_files import INDEX
from mmx.checkpoint.locate import HF_CONFIG, ORBAX_CONFIG, TOKENIZER_FILES
from mmx.errors import UserError

ARRAYS, EXTRA = "arrays", "extra.json"  # of an orbax checkpoint
_FILES = {HF_CONFIG, ORBAX_CONFIG, EXTRA, INDEX, "generation_config.json",
          "operative_config.gin", *TOKENIZER_FILES}
_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


def check_target(directory: str | Path, overwrite: bool) -> None:
    """Refuses a place whose files would be lost; to be called before anything is written.

    Raises UserError for a file, the working or home directory or one above them, and a directory
    that is not empty: with `overwrite` only where it holds what no checkpoint's writer makes.
    """
    directory = Path(directory).absolute()
    if directory.is_file():
        raise UserError(f"{directory} is a file.", "A checkpoint is a directory.",
                        "Name a directory that does not exist yet.")
    place = directory.resolve()
    for name, kept in (("working", Path.cwd()), ("home", Path(os.path.expanduser("~")))):
        if place in (kept.resolve(), *kept.resolve().parents):
            raise UserError(f"{directory} is the {name} directory, or above it.",
                            "A checkpoint takes the place of its whole directory.",
                            "Name a directory that does not exist yet.")
    found = sorted(directory.iterdir()) if directory.is_dir() else []
    if found and not overwrite:
        raise UserError(f"{directory} exists and is not empty.",
                        "A checkpoint is not written over other files.",
                        "Name another directory, or overwrite it (--overwrite, overwrite=True).")
    for path in found:
        if not _is_ours(path):
            raise UserError(f"{directory} holds '{path.name}', which is no part of a checkpoint.",
                            "Only a directory that holds nothing else is overwritten.",
                            "Name another directory, or move it away.")


def _is_ours(path: Path) -> bool:
    if path.name == ARRAYS:  # orbax's own mark tells it from another folder of that name
        return (path / "_CHECKPOINT_METADATA").is_file()
    return path.is_file() and (path.name in _FILES or _SHARD.fullmatch(path.name) is not None)
