"""From what a user writes after --model to a directory and its configuration."""

import importlib.resources
import json
import re
import shutil
from pathlib import Path

from mmx.config import ModelConfig, preset_names
from mmx.errors import UserError, nearest

EMBEDDED = "nano"
HF_CONFIG = "config.json"
ORBAX_CONFIG = "mmx_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
                   "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
                   "chat_template.json", "tokenizer.model", "spiece.model")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?$")
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", HF_CONFIG, "generation_config.json",
              *TOKENIZER_FILES]
_HUB_TEXT_FILES = [pattern for pattern in _HUB_FILES if pattern != "*.safetensors"]


def locate(path_or_id: str | Path, weights: bool = True) -> Path:
    """Returns the local directory of a model: "nano" (embedded), a directory, or a hub id.

    A hub id `org/name` or `org/name@revision` is fetched into the hub's cache; without `weights`
    only its configuration and tokenizer are. Raises UserError when there is no such model.
    """
    name = str(path_or_id)
    if name == EMBEDDED:
        return Path(str(importlib.resources.files("mmx") / "assets" / EMBEDDED))
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            if not _is_model(path):
                raise UserError(f"{path} is not a model directory.",
                                f"It holds {HF_CONFIG} beside .safetensors files, or a checkpoint "
                                "that mmx saved.", "Check the path.")
            return path
        if path.is_file():
            raise UserError(f"{path} is a file.", "A model is a directory.",
                            f"Give its directory: {path.parent}.")
    except PermissionError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).",
                        "The model directory must be readable.", "Change its permissions."
                        ) from error
    if name in preset_names():
        raise UserError(f"The preset '{name}' has no weights.",
                        "It names a geometry; only 'nano' is shipped with weights.",
                        "Give a directory with the weights, or a hub id.")
    if _HUB_ID.match(name) and not path.parent.is_dir():
        return _fetch(name, weights)
    raise UserError(f"There is no model at '{name}'.",
                    "A model is 'nano', a directory, or a hub id 'org/name'.",
                    nearest(name, preset_names()) or "Check the path.")


def _is_model(path: Path) -> bool:
    return any((path / name).exists() for name in (HF_CONFIG, ORBAX_CONFIG))


def _fetch(name: str, weights: bool) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(f"'{name}' looks like a hub id, and huggingface_hub is not installed.",
                        "Hub models are fetched with it.",
                        "Run: pip install huggingface_hub") from error
    repo, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(
            repo, revision=revision or None,
            allow_patterns=_HUB_FILES if weights else _HUB_TEXT_FILES))
    except Exception as error:  # the hub's client raises a dozen unrelated types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        reason = reason.removeprefix("Got: ").rstrip(".")
        raise UserError(f"'{name}' is no directory here, and the hub did not give it: {reason}.",
                        "A hub id needs the network, or a copy in the hub's cache.",
                        "Check the spelling, or download it and give the directory.") from error


def copy_tokenizer(source: str | Path, target: Path) -> None:
    """Copies whatever tokenizer files `source` holds."""
    for name in TOKENIZER_FILES:
        if (Path(source) / name).exists():
            shutil.copyfile(Path(source) / name, target / name)


def read_json(path: Path) -> dict:
    """Parses a JSON object; UserError when it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).",
                        "It comes with the weights.", "Check the path and its permissions."
                        ) from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}.", "It must be one JSON object.",
                        "Fetch it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold an object.", "It must be one JSON object.",
                        "Fetch it again.")
    return content


def load_config(path_or_id: str | Path) -> ModelConfig:
    """Reads the configuration of a model without its weights.

    The end-of-sequence ids of a generation_config.json beside config.json come first, because the
    release leaves them out of config.json.
    """
    directory = locate(path_or_id, weights=False)
    if (directory / ORBAX_CONFIG).exists():
        return ModelConfig.from_hf(read_json(directory / ORBAX_CONFIG))
    hf = read_json(directory / HF_CONFIG)
    config = ModelConfig.from_hf(hf)
    generation = directory / "generation_config.json"
    if generation.exists() and (eos := read_json(generation).get("eos_token_id")) is not None:
        ids = eos if isinstance(eos, list) else [eos]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise UserError(f"{generation}: eos_token_id is {eos!r}.",
                            "It must be a token id or a list of them.", "Correct the file.")
        config = config.replace(eos_token_ids=tuple(ids))
    return config
