"""A conversation on a terminal: one line in, a streamed answer out, until Ctrl-D."""

import sys

from mmx.cli.session import Session
from mmx.cli.shared import sampling_params
from mmx.engine.request import Result
from mmx.errors import UserError
from mmx.obs import log
from mmx.text.tokenizer import BEGIN_SENTENCE

_COMMANDS = "/clear forgets what was said, /exit or Ctrl-D ends, Ctrl-C stops an answer."


def hold_chat(session: Session, settings, tools: list[dict] | None) -> None:
    """Reads lines from the terminal and answers each, with all that was said before.

    A model whose tokenizer has no turn markers was not trained on chats: each line is then a text
    to go on from.
    """
    try:
        import readline  # noqa: F401  line editing and history for input()
    except ImportError:
        pass
    chats = BEGIN_SENTENCE in session.tokenizer.markers
    system = [] if settings.system is None else [{"role": "system", "content": settings.system}]
    messages = list(system)
    how = "Type a message." if chats else f"{session.name} is no chat model: type a text to go on."
    log.note(f"{how} {_COMMANDS}")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            sys.stdout.write("\n")
            return
        if line in ("/exit", "/quit"):
            return
        if line == "/clear":
            messages = list(system)
        elif line.startswith("/"):
            log.note(_COMMANDS)
        elif line:
            turn = [*messages, {"role": "user", "content": line}]
            try:
                ids = session.chat_ids(turn, tools) if chats else session.tokenizer.encode(line)
                said, result = _answer(session, ids, sampling_params(settings))
            except UserError as error:  # a turn too long ends the turn, not the conversation
                log.note(f"mmx: {error}")
                continue
            messages = [*turn, {"role": "assistant", "content": said}] if chats else messages
            if result is not None:
                session.tell(result)


def _answer(session: Session, ids: list[int], sampling) -> tuple[str, Result | None]:
    """Streams an answer; returns what was said, and no result when Ctrl-C cut it off."""
    pieces: list[str] = []

    def show(piece: str) -> None:
        pieces.append(piece)
        sys.stdout.write(piece)
        sys.stdout.flush()

    result = None
    try:
        result = session.answer(ids, sampling, show)
    except KeyboardInterrupt:
        pass
    sys.stdout.write("\n")
    sys.stdout.flush()
    return "".join(pieces), result
