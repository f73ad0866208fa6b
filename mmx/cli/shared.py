"""Settings and steps that several verbs share: sampling, and how a model is loaded."""

import dataclasses
import os
import tempfile
from pathlib import Path

from mmx.cli.settings import setting
from mmx.engine.request import SamplingParams
from mmx.errors import UserError

_HELP = {
    "max_tokens": "Most tokens to write.",
    "temperature": "Randomness; 0 takes the likeliest token.",
    "top_k": "Keep the k likeliest ids; 0 keeps all.",
    "top_p": "Keep the likeliest ids that together reach this probability.",
    "min_p": "Keep ids at least this fraction as likely as the likeliest.",
    "repetition_penalty": "Divide the logits of ids already seen by this.",
    "presence_penalty": "Subtract this once from ids already written.",
    "frequency_penalty": "Subtract this for each time an id was written.",
    "seed": "Seed of the random choices.",
    "stop": "Stop before this text.",
    "stop_token_ids": "Stop at this token id.",
    "ignore_eos": "Write on past the end-of-sequence token.",
    "logprobs": "Report the log-probabilities of this many likeliest ids per token.",
}
# One setting for each field of SamplingParams, which also holds their ranges: a parameter that is
# added there and has no help here is an error at once.
SamplingSettings = dataclasses.make_dataclass(
    "SamplingSettings",
    [(field.name, field.type, setting(field.default, _HELP[field.name], group="Sampling"))
     for field in dataclasses.fields(SamplingParams)],
    frozen=True, namespace={"__post_init__": lambda self: sampling_params(self) and None})


def sampling_params(settings: SamplingSettings) -> SamplingParams:
    """Returns the sampling part of a verb's settings; raises UserError for one out of range."""
    return SamplingParams(**{field.name: getattr(settings, field.name)
                             for field in dataclasses.fields(SamplingParams)})


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """Which weights, and how they are held."""

    model: str = setting(
        "nano", "A checkpoint directory, a hub id, or a preset; nano is embedded.", group="Model")
    random_weights: bool = setting(
        False, "Run a preset's geometry on random weights: for trying sizes and speed.",
        group="Model")
    dtype: str | None = setting(
        None, "Number format of weights and activations; float32 on a CPU unless given.",
        group="Model", choices=("float32", "bfloat16"))
    quantize: str | None = setting(
        None, "Hold the large matrices in 8 bits.", group="Model", choices=("int8",))
    mesh: str | None = setting(
        None, "Devices to spread the weights over, for example 'tensor=8' or 'expert=4,tensor=2'; "
        "one device unless given.", group="Model")
    max_host_bytes: int = setting(
        2 << 30, "Host memory that reading a checkpoint may take beyond the result.",
        group="Model", low=1 << 20, size=True)
    compilation_cache: str = setting(
        "", "Directory that keeps compiled programs for the next start, or 'off'; by default one "
        "of the user's cache.", group="Model")


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """How requests are run; answers depend on these by rounding alone."""

    capacity: int | None = setting(
        None, "Most tokens of prompt and answer together; the cache grows as needed unless given.",
        group="Engine", low=1)
    prefill_chunk: int = setting(2048, "Longest piece of a prompt that is read at once.",
                                 group="Engine", low=1)
    kv_dtype: str | None = setting(None, "Number format of cached keys and values.",
                                   group="Engine", choices=("float32", "bfloat16"))


def check_output(path: str, flag: str = "output", folder: bool = False,
                 parents: bool = True) -> None:
    """Refuses, at the start, an output that could not be written at the end; leaves nothing behind.

    Args:
      path: a file, or with `folder` a directory, that a verb is to write.
      flag: which setting named it.
      parents: whether the verb makes the directories above it that are missing.
    Raises UserError for a path of the other kind, and one where no file can be made.
    """
    place = Path(path).absolute()
    kind = "folder" if folder else "file"
    if place.exists() and not (place.is_dir() if folder else place.is_file()):
        raise UserError(f"--{flag}={path!r} is not a {kind}.", f"A {kind} is written there.",
                        "Name another.")
    within = place if folder else place.parent
    while parents and not within.exists():
        within = within.parent
    try:
        with tempfile.TemporaryFile(dir=within):
            pass
    except OSError as error:
        raise UserError(
            f"The folder '{within}' of --{flag} cannot be written to ({error.strerror.lower()}).",
            "It must exist, with the right to write in it.", "Name another place.") from None


def enable_compilation_cache(directory: str = "") -> None:
    """Keeps compiled programs on disk; to be called before jax is imported.

    `directory` "" means $JAX_COMPILATION_CACHE_DIR, else `mmx/jax` in the user's cache directory,
    left out where it cannot be made: a run without it is only slower. "off" keeps none. Raises
    UserError for a directory that is named here and cannot be made.
    """
    named = directory
    if directory == "off":
        os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
        return
    if not directory:
        directory = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    if not directory:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        directory = str(Path(base) / "mmx" / "jax")
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError as error:
        if named:
            raise UserError(
                f"--compilation_cache={named} cannot be made ({error.strerror.lower()}).",
                "It is a folder that keeps compiled programs.", "Name another, or 'off'.") from None
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = directory
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
