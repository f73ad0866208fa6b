"""A language model in one object: load, score, generate, stream, save."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mmx import model
from mmx.config import ModelConfig, preset, preset_names
from mmx.engine import memory
from mmx.engine.engine import Engine
from mmx.engine.memory import one_arena
from mmx.engine.request import Event, Request, Result, SamplingParams
from mmx.errors import UserError
from mmx.sharding.absent import skip_absent_accelerators
from mmx.text import Tokenizer, load_tokenizer, render_ids

Prompt = str | Sequence[int]
# Sequences that generate() runs together unless told otherwise.
DEFAULT_SLOTS = 8


class LM:
    """Parameters with their tokenizer; made by `load`.

    Attributes:
      config: geometry.
      params: flat dict path -> array.
      tokenizer: None if the model has none; prompts are then lists of ids.
    """

    def __init__(self, config: ModelConfig, params: Mapping[str, Any],
                 tokenizer: Tokenizer | None = None, tokenizer_dir: str | Path | None = None):
        self.config, self.params, self.tokenizer = config, params, tokenizer
        self._tokenizer_dir = tokenizer_dir
        self._engines: dict[tuple, Engine] = {}
        self._forward = jax.jit(lambda params, ids_BT: model.forward(config, params, ids_BT)[0])

    def logits(self, ids_BT) -> jax.Array:
        """Returns float32 logits [B, T, V] for token ids [B, T] (or [T], as a batch of one)."""
        try:
            ids_BT = np.atleast_2d(np.asarray(ids_BT, np.int32))
        except (ValueError, TypeError, OverflowError) as error:
            raise UserError("The token ids are no array of whole numbers.",
                            "They are [B, T], or [T]: all sequences of one length.",
                            "Score sequences of different lengths one by one.") from error
        if ids_BT.size == 0 or ids_BT.min() < 0 or ids_BT.max() >= self.config.vocab_size:
            raise UserError("The token ids cannot be scored.",
                            f"They must be at least one, in 0 … {self.config.vocab_size - 1}.",
                            "Encode the text with this model's tokenizer.")
        return self._forward(self.params, ids_BT)

    def generate(self, prompts: Prompt | Sequence[Prompt], *, slots: int | None = None,
                 **sampling) -> list[Result]:
        """Returns one Result per prompt, in order.

        Args:
          prompts: texts, or lists of token ids; a single one is a list of one.
          slots: most sequences that decode together; results do not depend on it.
          sampling: fields of `mmx.engine.SamplingParams`, for example `max_tokens=64,
            temperature=0.7, top_p=0.9, seed=1, stop=("###",)`. Each prompt has its own random
            stream from `seed`.

        Raises UserError for a prompt or setting that cannot be used, before anything runs.
        """
        params = _sampling(sampling)
        scalar = isinstance(prompts, np.ndarray) and not prompts.ndim  # iterable by its type alone
        if scalar or not isinstance(prompts, Iterable):
            raise _no_prompt(prompts)
        prompts = [prompts] if _is_prompt(prompts) else list(prompts)
        requests = [Request(i, self._ids(prompt), params) for i, prompt in enumerate(prompts)]
        if not requests:
            return []
        engine = self._engine(slots or min(DEFAULT_SLOTS, _power_of_two(len(requests))))
        for request in requests:
            engine.check(request)
        engine.reserve(max(map(engine.room, requests)))
        results: list[Any] = [None] * len(requests)
        for event in engine.run(requests):
            if event.result is not None:
                results[event.key] = event.result
        return results

    def stream(self, prompt: Prompt, **sampling) -> Iterator[str]:
        """Yields the text of a reply in pieces that never cut a character; see `generate`."""
        for event in self.events(prompt, **sampling):
            if event.text_piece:
                yield event.text_piece

    def events(self, prompt: Prompt, **sampling) -> Iterator[Event]:
        """Yields an Event per token; the last one carries the Result."""
        request = Request(0, self._ids(prompt), _sampling(sampling))
        yield from self._engine(1).run([request])

    def chat(self, messages: Sequence[Mapping], tools: Sequence[Mapping] | None = None,
             **sampling) -> Result:
        """Returns the reply to OpenAI-style messages (dicts with "role" and "content")."""
        if self.tokenizer is None:
            raise UserError("This model has no tokenizer.", "A chat is rendered as text.",
                            "Load it from a directory with tokenizer files.")
        return self.generate([render_ids(self.tokenizer, messages, tools)], **sampling)[0]

    def save(self, directory: str | Path, layout: str = "original", dtype: str = "bfloat16",
             overwrite: bool = False) -> Path:
        """Writes a checkpoint in `layout` ("original" or "transformers"); see `save_hf`."""
        from mmx.checkpoint import save_hf

        return save_hf(directory, self.config, self.params, layout=layout, dtype=dtype,
                       tokenizer_dir=self._tokenizer_dir, overwrite=overwrite)

    def engine(self, **settings) -> Engine:
        """Returns a new `mmx.engine.Engine` over these parameters, with its settings."""
        return Engine(self.config, self.params, self.tokenizer, **settings)

    def _engine(self, slots: int) -> Engine:
        if slots not in self._engines:
            self._engines[slots] = self.engine(slots=slots)
        return self._engines[slots]

    def _ids(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            try:
                return [int(token) for token in prompt]
            except (TypeError, ValueError):
                raise _no_prompt(prompt) from None
        if self.tokenizer is None:
            raise UserError("This model has no tokenizer.", "A text prompt needs one.",
                            "Give lists of token ids.")
        return self.tokenizer.encode(prompt)


def load(path_or_id: str | Path = "nano", *, dtype: str | None = None,
         quantize: str | None = None, mesh: jax.sharding.Mesh | str | None = None,
         max_host_bytes: int = 2 << 30, random_weights: bool = False, seed: int = 0,
         progress: Callable[[int, int], None] | None = None,
         turned: bool | None = None) -> LM:
    """Returns the model at `path_or_id` as an `LM`.

    Args:
      path_or_id: "nano" (embedded), a directory in either published layout or saved by mmx, or a
        hub id `org/name[@revision]`; with `random_weights` also a preset without weights.
      dtype: of weights and activations; float32 on a CPU and bfloat16 elsewhere if None.
      quantize: "int8" holds the large matrices in 8 bits.
      mesh: devices over which the parameters are spread, as a Mesh or as text such as
        "expert=4,tensor=2"; the default device if None. In a job of several processes (see
        `mmx.sharding.distributed.start`) it may hold the devices of all, who then make every call
        alike.
      max_host_bytes: host memory that reading may take beyond the result.
      random_weights: draw the weights from `seed` instead of reading them.
      progress: called with (done, total) elements.
      turned: whether int8 matrices lie with the contracted axis innermost, as kernels for Hopper
        GPUs multiply them without casts; where those run if None (`mmx.quant.turns`).

    Raises UserError for anything that is missing or does not fit.
    """
    from mmx.checkpoint import load_config, load_params, locate

    one_arena()
    skip_absent_accelerators()
    dtype = dtype or default_dtype()
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype={dtype!r} is not supported.", "It is 'float32' or 'bfloat16'.",
                        "Leave it out for the usual one.")
    if isinstance(mesh, str):
        from mmx.sharding.mesh import parse_mesh

        mesh = parse_mesh(mesh)
    shardings = None if mesh is None else partial(_shardings, mesh=mesh)
    if not random_weights:
        if mesh is None:
            memory.check_room(path_or_id, load_config(path_or_id), dtype, quantize)
        directory = locate(path_or_id)
        tokenizer = load_tokenizer(directory)
        config, params = load_params(
            directory, dtype=dtype, quantize=quantize, shardings=shardings,
            max_host_bytes=max_host_bytes, progress=progress, turned=turned)
        return LM(config, params, tokenizer, directory)

    from mmx.quant import check_mode, lay, quantize_params

    check_mode(quantize)
    if str(path_or_id) in preset_names():
        config, tokenizer, directory = preset(str(path_or_id)), None, None
    else:
        config, directory = load_config(path_or_id), locate(path_or_id, weights=False)
        tokenizer = load_tokenizer(directory)
    if mesh is None:
        memory.check_room(path_or_id, config, dtype, None)  # quantised only once drawn
    params = model.init_params(config, jax.random.key(seed), dtype,
                               None if shardings is None else shardings(config))
    if quantize:
        params = quantize_params(params)
        params = lay(model.param_specs(config, dtype), params, turned)
    return LM(config, params, tokenizer, directory)


def default_dtype() -> str:
    """The dtype of weights and activations on this machine's devices where none is asked for."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def _shardings(config: ModelConfig, mesh) -> dict[str, jax.sharding.Sharding]:
    from mmx.sharding.rules import DECODE, param_shardings

    return param_shardings(model.param_specs(config), mesh, DECODE)


def _sampling(settings: Mapping[str, Any]) -> SamplingParams:
    names = [field.name for field in dataclasses.fields(SamplingParams)]
    for name in settings:
        if name not in names:
            raise UserError(f"There is no sampling setting '{name}'.",
                            f"Settings are {', '.join(names)}.", "Correct its name.")
    return SamplingParams(**settings)


def _no_prompt(value) -> UserError:
    return UserError(f"A prompt cannot be {value!r:.60}.", "It is a text or a list of token ids.",
                     "Pass one, or a list of them.")


def _is_prompt(prompts) -> bool:
    """A text, or a flat list of ids (Python or NumPy integers)."""
    if isinstance(prompts, str):
        return True
    return len(prompts) > 0 and all(isinstance(p, (int, np.integer)) for p in prompts)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
