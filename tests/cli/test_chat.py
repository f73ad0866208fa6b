"""The conversation on a terminal, with its lines typed by the test."""

import sys

import pytest

from mmx.cli.session import Session


class Keyboard:
    """Stands for the terminal: `input` gives the lines, then the end of input."""

    def __init__(self, *lines):
        self.lines = list(lines)

    def __call__(self, prompt=""):
        if not self.lines:
            raise EOFError
        return self.lines.pop(0)


@pytest.fixture
def talk(mmx, checkpoint, monkeypatch):
    """Runs a conversation; returns (exit code, stdout, stderr, ids of each prompt)."""
    def run(*lines, argv=(), answer=None):
        prompts = []
        own = Session.answer

        def watched(self, ids, sampling, stream):
            prompts.append(ids)
            return (answer or own)(self, ids, sampling, stream)

        monkeypatch.setattr(Session, "answer", watched)
        monkeypatch.setattr("builtins.input", Keyboard(*lines))
        monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
        result = mmx("generate", f"--model={checkpoint}", "--max_tokens=3", *argv)
        monkeypatch.undo()
        return *result, [bytes(id for id in ids if id < 256).decode() for ids in prompts]

    return run


def test_a_conversation_carries_what_was_said(talk):
    code, out, err, prompts = talk("hello", "", "/what", "again", "/clear", "new", "/exit",
                                   argv=("--system=be brief",))
    assert code == 0
    assert err.count("Ctrl-C stops an answer") == 2 and err.count("→ 3 tokens") == 3
    assert "be brief" in prompts[0] and "hello" in prompts[0]
    assert prompts[1].startswith(prompts[0][:-1]) and "again" in prompts[1]
    assert "be brief" in prompts[2] and "new" in prompts[2] and "hello" not in prompts[2]


def test_interrupting_an_answer_keeps_the_conversation(talk):
    def interrupted(session, ids, sampling, stream):
        stream("half an ans")
        raise KeyboardInterrupt

    code, out, _, prompts = talk("hello", "go on", answer=interrupted)
    assert code == 0 and out.count("half an ans\n") == 2
    assert "half an ans" in prompts[1]


def test_a_turn_too_long_ends_the_turn_alone(talk):
    code, _, err, prompts = talk("x" * 200, "ok", argv=("--capacity=120",))
    assert code == 0 and len(prompts) == 2 and "x" not in prompts[1]
    assert "mmx: The prompt has" in err and err.count("→ 3 tokens") == 1


def test_a_chat_is_not_for_json(mmx, monkeypatch):
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    code, _, err = mmx("generate", "--json")
    assert code == 2 and "--json has no prompt" in err
