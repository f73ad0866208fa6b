"""A loaded model with its engine, as the verbs use it: prompts in, results and figures out."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mmx import lm as models
from mmx.batch.answers import token_logprobs, usage
from mmx.checkpoint import locate
from mmx.engine.request import Event, Request, Result, SamplingParams
from mmx.errors import UserError
from mmx.obs import log, memory
from mmx.obs.progress import Progress
from mmx.text import chat, functions, load_tokenizer

_NOTE_SECONDS = 10.0


class Session:
    """Loads what the settings name; `slots` sequences run together."""

    def __init__(self, settings, slots: int = 1):
        self.name = settings.model
        lm = load(settings)
        self.tokenizer = lm.tokenizer
        self.engine = lm.engine(slots=slots, capacity=settings.capacity,
                                prefill_chunk=settings.prefill_chunk, kv_dtype=settings.kv_dtype)

    def chat_ids(self, messages: list[dict], tools: list[dict] | None = None) -> list[int]:
        return chat.render_ids(self.tokenizer, messages, tools)

    def tool_calls(self, text: str) -> list[dict[str, Any]]:
        """The function calls in an answer, in OpenAI's form."""
        calls = functions.parse_calls(text, chat.protocol_of(self.tokenizer))
        return [{"id": f"call_{number}", "type": "function",
                 "function": {"name": one.name, "arguments": one.arguments}}
                for number, one in enumerate(calls)]

    def answer(self, prompt_ids: list[int], sampling: SamplingParams,
               stream: Callable[[str], None]) -> Result:
        """Runs one request, handing text to `stream` as it comes.

        A bar, or lines, show how far a prompt of several chunks has been read.
        """
        with Progress(len(prompt_ids), "tokens", title="prompt") as bar:
            events = self.engine.run([Request(0, prompt_ids, sampling)],
                                     lambda key, read, total: bar.reach(read, total))
            first = next(events)
        for event in itertools.chain((first,), events):
            if event.text_piece:
                stream(event.text_piece)
        return event.result

    def run(self, requests: Iterable[Request]) -> Iterator[Event]:
        """Runs requests; lines tell how far a long prompt has been read."""
        told = time.monotonic()

        def tell(key, read, total):
            nonlocal told
            if time.monotonic() - told >= _NOTE_SECONDS:
                told = time.monotonic()
                log.note(f"request {key}: {read:,} of {total:,} prompt tokens read")

        return self.engine.run(requests, tell)

    def report(self, result: Result, load_s: float, with_calls: bool = False) -> dict[str, Any]:
        """A result and its figures as JSON values."""
        times = result.timings
        report = {
            "model": self.name, "text": result.text, "ids": result.ids,
            "finish_reason": result.finish_reason, "usage": usage(result),
            "timings": {
                "load_s": round(load_s, 4), "first_token_s": round(times.queue_s
                                                                   + times.prefill_s, 4),
                "decode_s": round(times.decode_s, 4),
                "decode_tokens_per_s": round(times.decode_tokens_per_s, 2)},
            "memory": {"host_peak_bytes": memory.host_peak_bytes(),
                       "device_peak_bytes": memory.device_peak_bytes()}}
        if result.logprobs is not None:
            report["logprobs"] = token_logprobs(result.logprobs, self.tokenizer.token_bytes)
        if with_calls:
            report["tool_calls"] = self.tool_calls(result.text)
        return report

    def tell(self, result: Result, load_s: float | None = None) -> None:
        """Says on stderr how fast and how large it was."""
        times = result.timings
        parts = [f"{result.prompt_tokens:,} → {len(result.ids):,} tokens "
                 f"({result.finish_reason})"]
        if load_s is not None:
            parts.append(f"loaded in {load_s:.1f} s")
        parts.append(f"first token {times.queue_s + times.prefill_s:.2f} s")
        if len(result.ids) > 1:
            parts.append(f"{times.decode_tokens_per_s:.1f} tok/s")
        log.note(" · ".join([*parts, memory.summary()]))


def load(settings) -> models.LM:
    """Loads what --model names, telling how far it is."""
    with Progress(None, "parameters", title="load") as bar:
        lm = models.load(
            settings.model, dtype=settings.dtype, quantize=settings.quantize,
            mesh=_local_mesh(settings.mesh), max_host_bytes=settings.max_host_bytes,
            random_weights=settings.random_weights,
            seed=settings.seed, progress=bar.reach)
    if lm.tokenizer is None:
        # A preset on random weights: any tokenizer will do, what comes out means nothing.
        lm.tokenizer = load_tokenizer(locate("nano"))
    return lm


def _local_mesh(text: str | None):
    """The mesh within this process, which then holds the whole model, or over all processes."""
    import jax

    if text is None or jax.process_count() == 1:
        return text
    import numpy as np

    from mmx.sharding.mesh import parse_mesh

    mesh, devices = parse_mesh(text), jax.local_devices()
    if mesh.size == jax.device_count() > len(devices):
        return mesh
    if mesh.size > len(devices):
        raise UserError(f"The mesh '{text}' has {mesh.size} devices.",
                        f"A process has {len(devices)}, all together {jax.device_count()}; a model "
                        "lies over those of one process or over all.",
                        "Make the product of its sizes one of the two.")
    grid = np.asarray(devices[:mesh.size]).reshape(mesh.devices.shape)
    return jax.sharding.Mesh(grid, mesh.axis_names, axis_types=mesh.axis_types)
