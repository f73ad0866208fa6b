"""Write text after a prompt, or chat.

Tokens stream to stdout as they come; speed and memory are told on stderr.
"""

import dataclasses
import json
import sys
import time

from mmx.cli.hosts import HostSettings, joined, spans_processes
from mmx.cli.settings import setting
from mmx.cli.shared import (
    EngineSettings,
    ModelSettings,
    SamplingSettings,
    check_output,
    enable_compilation_cache,
    sampling_params,
)
from mmx.errors import UserError

EXAMPLE = """
mmx generate --model=nano --prompt="To install the program, you" --max_tokens=100
mmx generate --prompt_file=notes.txt --temperature=0.7 --top_p=0.95 --json
mmx generate --model=DIR --chat --system="Answer briefly."
"""
WORD = "prompt"


@dataclasses.dataclass(frozen=True)
class GenerateSettings(HostSettings, EngineSettings, SamplingSettings, ModelSettings):
    prompt: str | None = setting(
        None, "The text to go on from, also without the flag. If none is given stdin is read; on a "
        "terminal, a chat begins.", group="Input")
    prompt_file: str | None = setting(
        None, "A file with the text, '-' for stdin. Its last line break is left out.",
        group="Input", value="FILE")
    chat: bool | None = setting(
        None, "The prompt is a user's message: apply the chat format. --system and --tools imply "
        "it.", group="Input")
    system: str | None = setting(None, "System message of the chat.", group="Input")
    tools: str | None = setting(
        None, "A JSON file with the list of functions that the chat offers.", group="Input",
        value="FILE")
    json: bool = setting(False, "Write one JSON object at the end instead of streaming text.",
                         group="Output")
    output: str | None = setting(
        None, "Also write what goes to stdout into this file, and the configuration beside it.",
        group="Output", value="FILE")


Settings = GenerateSettings


def run(call) -> None:
    """Answers one prompt, or holds a chat on a terminal."""
    settings = call.settings
    if settings.prompt is not None and settings.prompt_file is not None:
        raise UserError("--prompt and --prompt_file are both given.", "There is one prompt.",
                        "Leave one out.")
    if settings.logprobs and not settings.json:
        raise UserError("--logprobs has no meaning without --json.",
                        "Log-probabilities stand in the JSON object alone.", "Add --json.")
    parts = _parts_of_chat(settings)
    if settings.chat is False and parts:
        raise UserError(f"--nochat and --{parts[0]} exclude each other.",
                        f"--{parts[0]} is part of the chat format.", "Leave one out.")
    enable_compilation_cache(settings.compilation_cache)
    with joined(settings.distributed) as pod:
        _answer(call, pod)


def _answer(call, pod) -> None:
    """Process 0 reads the prompt and writes the answer; all go through the same steps."""
    settings, prompt, tools = call.settings, None, None
    if pod.count > 1:
        _check_mesh(settings.mesh, pod.count)
    if pod.is_main:
        prompt, tools = _prompt(settings), _tools(settings)
        if prompt is None and (settings.json or pod.count > 1):
            what, rule = "--json has no prompt.", "A chat on a terminal is for people."
            if pod.count > 1:
                what, rule = "There is no prompt.", "A chat on a terminal is held by one process."
            raise UserError(what, rule, "Add --prompt=TEXT.")
        if settings.output:
            check_output(settings.output, parents=False)
    from mmx.cli.session import Session

    began = time.monotonic()
    call.announce()
    session = Session(settings)
    load_s = time.monotonic() - began
    if pod.is_main and prompt is None:
        from mmx.cli.chat import hold_chat

        hold_chat(session, settings, tools)
        return
    ids, chat = None, bool(settings.chat or _parts_of_chat(settings))
    if pod.is_main and chat:
        messages = [{"role": "user", "content": prompt}]
        if settings.system is not None:
            messages.insert(0, {"role": "system", "content": settings.system})
        ids = session.chat_ids(messages, tools)
    elif pod.is_main:
        ids = session.tokenizer.encode(prompt)
    if pod.count > 1:
        from mmx.parallel.hosts import from_main

        pod.barrier("prompt")  # process 0 may have waited long for it
        ids = from_main(ids)
    stream = _ignore if settings.json or not pod.is_main else _to_stdout
    result = session.answer(ids, sampling_params(settings), stream)
    if not pod.is_main:
        return
    if settings.json:
        text = json.dumps({**session.report(result, load_s, chat), "config": call.config},
                          ensure_ascii=False) + "\n"
        sys.stdout.write(text)
    else:
        text = result.text + "\n"
        _to_stdout("\n")
        session.tell(result, load_s)
    if settings.output:
        from mmx.batch.journal import write_text

        write_text(settings.output, text)
        call.save(settings.output + ".config.gin")


def _parts_of_chat(settings: GenerateSettings) -> list[str]:
    """The settings given that only a chat has a place for."""
    return [name for name in ("system", "tools") if getattr(settings, name) is not None]


def _check_mesh(mesh: str | None, processes: int) -> None:
    """Several processes answer one prompt only with one model over all their devices."""
    if not spans_processes(mesh):
        given = f"--mesh={mesh} lies within one" if mesh else "there is no --mesh"
        raise UserError(f"{processes} processes were started, and {given}.",
                        "They answer one prompt with one model over the devices of all.",
                        "Name a mesh as large as all devices, or start one process.")


def _to_stdout(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _ignore(piece: str) -> None:
    pass


def _prompt(settings: GenerateSettings) -> str | None:
    """The text to answer, or None for a chat on a terminal."""
    if settings.prompt is not None:
        text = settings.prompt
    elif settings.prompt_file not in (None, "-"):
        text = _read(settings.prompt_file, "prompt file")
    elif settings.prompt_file is None and sys.stdin.isatty():
        return None
    else:
        text = _decode(sys.stdin.buffer.read(), "standard input")
    if settings.prompt is None:
        text = text.removesuffix("\n")
    if not text:
        raise UserError("The prompt is empty.", "An answer needs at least one token before it.",
                        'Write for example --prompt="To install the program, you".')
    return text


def _read(path: str, what: str) -> str:
    try:
        with open(path, "rb") as file:
            return _decode(file.read(), f"{what} '{path}'")
    except OSError as error:
        raise UserError(f"The {what} '{path}' cannot be read: {error.strerror.lower()}.",
                        "It is a text file.", "Check the path and its permissions.") from None


def _decode(data: bytes, what: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{what[0].upper()}{what[1:]} is not UTF-8 (byte {error.start}).",
                        "Text is read as UTF-8.", "Convert it first.") from None


def _tools(settings: GenerateSettings) -> list[dict] | None:
    if settings.tools is None:
        return None
    try:
        tools = json.loads(_read(settings.tools, "tools file"))
    except ValueError as error:
        raise UserError(f"The tools file '{settings.tools}' is not JSON: {error}.",
                        "It holds a list of function definitions.", "Mend the file.") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"The tools file '{settings.tools}' holds no list of objects.",
                        "It holds a list of function definitions.",
                        'Write [{"name": …, "description": …, "parameters": {…}}].')
    return tools
