"""Training checkpoints in a run's folder: numbered, atomic, the last few kept."""

from pathlib import Path
from typing import Any

from mmx.checkpoint import orbax_io
from mmx.config import ModelConfig
from mmx.errors import UserError


def folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / str(step)


def latest(run: Path) -> int | None:
    """The newest whole checkpoint's step, or None."""
    return orbax_io.latest_step(run / "checkpoints")


def save(run: Path, step: int, state: Any, extra: dict, keep: int, config: ModelConfig) -> None:
    """Saves `state` and the JSON `extra` at `step`, then drops all but the newest `keep`.

    Each checkpoint can also be loaded as a model.
    """
    orbax_io.save(folder(run, step), state, extra, config)
    orbax_io.keep_last(run / "checkpoints", keep)


def restore(run: Path, step: int, abstract: Any, identity: dict) -> tuple[Any, dict]:
    """Restores step `step` onto the shardings of `abstract`.

    Raises UserError when the run was started with other settings than `identity` names: resuming
    would then not continue it.
    """
    state, extra = orbax_io.restore(folder(run, step), abstract)
    for name, value in identity.items():
        if extra.get("identity", {}).get(name) != value:
            raise UserError(
                f"{run} holds a run with another {name} ({extra['identity'].get(name)!r}, "
                f"now {value!r}).", "A run resumes only with the settings it began with.",
                "Use another --run (with --init_from to start from its weights), or restore the "
                "setting.")
    return state, extra
