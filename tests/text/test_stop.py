"""Stop strings across pieces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmx.errors import UserError
from mmx.text import StopMatcher

LETTERS = st.text("ab\u00e9", max_size=12)


def run(stops, pieces):
    matcher, out = StopMatcher(stops), []
    for piece in pieces:
        text, stopped = matcher.push(piece)
        out.append(text)
        if stopped:
            return "".join(out), matcher.matched
    return "".join(out) + matcher.finish(), None


def by_hand(stops, text):
    """The stop that is complete first cuts the text; of two, the longer."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[:end - len(stop)], stop
    return text, None


@given(pieces=st.lists(LETTERS, max_size=8),
       stops=st.lists(st.text("ab\u00e9", min_size=1, max_size=4), max_size=3))
def test_any_cut_gives_the_same_text(pieces, stops):
    assert run(stops, pieces) == by_hand(stops, "".join(pieces))


@given(pieces=st.lists(LETTERS, max_size=8), stop=st.text("ab", min_size=1, max_size=4))
def test_nothing_is_held_that_can_not_begin_a_stop(pieces, stop):
    matcher, shown, seen = StopMatcher(stop), "", ""
    for piece in pieces:
        text, stopped = matcher.push(piece)
        seen, shown = seen + piece, shown + text
        if stopped:
            break
        held = seen.removeprefix(shown)
        assert seen == shown + held and stop.startswith(held)
        longer = [n for n in range(len(held) + 1, len(stop)) if seen.endswith(stop[:n])]
        assert not longer


def test_a_prefix_is_held_back_until_it_is_decided():
    matcher = StopMatcher(["\n\nUser:"])
    assert matcher.push("Hello\n") == ("Hello", False)
    assert matcher.push("\nUs") == ("", False)
    assert matcher.push("age\n\nUser") == ("\n\nUsage", False)
    assert matcher.push(": x") == ("", True)
    assert matcher.push("more") == ("", True)
    assert (matcher.matched, matcher.finish()) == ("\n\nUser:", "")


def test_one_string_is_one_stop():
    assert run("ab", ["xaab"]) == ("xa", "ab")


@pytest.mark.parametrize("stops", [[""], ["a", None], [3]])
def test_bad_stop_strings(stops):
    with pytest.raises(UserError, match="Stop string"):
        StopMatcher(stops)
