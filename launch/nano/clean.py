"""Decide which text blocks are plain English prose, and join them into documents."""

from __future__ import annotations

import hashlib
import re
import unicodedata

from extract import Block

_MAP = str.maketrans(
    {
        "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u00b4": "'", "\u2032": "'",
        "\u2013": "-", "\u2014": " - ", "\u2010": "-", "\u2011": "-", "\u2212": "-",
        "\u2026": "...",
        "\u00a0": " ", "\u00ad": None, "\u200b": None, "\u2022": "-", "\u2192": "->",
        "\ufeff": None,
        "\u00b6": None, "\u21b5": None, "\u00ab": '"', "\u00bb": '"', "\u201e": '"', "\u2122": None,
        "\u00ae": None, "\u200e": None, "\u2060": None,
    }
)  # fmt: skip
_STOP = frozenset(
    "the of and to a in is that for it as with be this are on by or an from at you which not can "
    "have has if will was when your may but all use used one any other its there into than more "
    "do does such these only they so also each their how we what then must should where some no "
    "up about between using most out same after before while because would been were he his her "
    "she who i my me him them had could our us did just like very much many".split()
)
_LEGAL = re.compile(
    r"permission is (?:hereby )?granted|redistribution and use|free documentation license"
    r"|without (?:any |even the implied )?warranty|all rights reserved|copyright|\(c\) ?\d{4}"
    r"|invariant sections|general public licen[sc]e|this program is free software|apache license"
    r"|creative commons|licensed under|trademark|definition at line|reimplemented (?:from|in)"
    r"|generated (?:by|on|from)|was introduced in qt|last (?:modified|updated|changed)"
    r"|see also:|click here|javascript|previous page|next page|table of contents|bug report"
    r"|lorem ipsum|sed ut perspiciatis|report a bug|page history|all contributors",
    re.I,
)
_ODD = re.compile(r"[{}<>=|\\_@#$%^*~/\[\]+&`]")
_IDENT = re.compile(r"\w*_\w+|\w+::\w+|\w*[a-z][A-Z]\w*|\w+\(\)|\S*/\S+/\S*|--\w+|\w+\.\w+\.\w+")
_NUMBERING = re.compile(
    r"^(?:(?:Chapter|Appendix|Section|Part) +)?(?:\d+(?:\.\d+)*|[A-Z](?:\.\d+)+|[IVX]+)[.:]* +"
    r"(?=[A-Z])"
)
_DULL = re.compile(r"(?i)(see also|index|contents|author|license|copying|name|synopsis)")
_ENDING = re.compile(r"[.!?:][\"')]*$")


def normalise(text: str) -> str:
    """One-line text with ASCII quotes and dashes, no footnote marks, single spaces."""
    text = unicodedata.normalize("NFC", text).translate(_MAP)
    text = re.sub(r"\[(?:\d+|citation needed|edit|link|source)\]", "", text)
    text = re.sub(r" +([,.;:!?)])(?=\s|$)", r"\1", " ".join(text.split()))
    return re.sub(r"\( +", "(", text).strip()


def is_prose(kind: str, text: str) -> bool:
    """Whether a normalised block reads as an English sentence or list item."""
    size = len(text)
    least = {"p": 40, "li": 24, "td": 90}.get(kind)
    if least is None or size < least or size > 6000:
        return False
    if not (text[0].isupper() or text[0] in "\"('" or (kind == "li" and text[0].isalpha())):
        return False
    if kind != "li" and not _ENDING.search(text):
        return False
    words = re.findall(r"[A-Za-z']+", text)
    count = len(words)
    if count < (5 if kind == "li" else 7) or max(map(len, words)) > 24:
        return False
    lowered = [w.lower() for w in words]
    stops = [w for w in lowered if w in _STOP]
    if len(stops) < 0.27 * count or len(set(stops)) < (2 if count < 12 else 3):
        return False
    if len(set(lowered)) < 0.3 * count:
        return False
    letters = sum(map(str.isalpha, text))
    if letters + text.count(" ") < 0.9 * size or (
        not text.isascii() and sum(c > "\x7f" for c in text) > 0.01 * size
    ):
        return False
    if len(_ODD.findall(text)) > 0.012 * size or len(_IDENT.findall(text)) > 0.08 * count:
        return False
    if text.count("http") > 1 or sum(w.isupper() and len(w) > 1 for w in words) > 0.15 * count:
        return False
    return not _LEGAL.search(text)


def is_heading(text: str) -> bool:
    """Whether a normalised heading is worth keeping in front of prose."""
    return (
        3 < len(text) <= 70
        and text[0].isupper()
        and sum(c.isalpha() or c == " " for c in text) >= 0.95 * len(text)
        and not _IDENT.search(text)
        and not _DULL.match(text)
    )


def fingerprint(text: str) -> bytes:
    """Hash of a paragraph blind to case, digits, spaces and punctuation."""
    letters = re.sub(r"[^a-z]+", " ", text.lower())
    return hashlib.blake2b(letters.encode(), digest_size=8).digest()


def prose_blocks(blocks: list[Block]) -> list[Block]:
    """Normalised headings and prose; what is dropped leaves one ("code", "") in its place."""
    kept: list[Block] = []
    for kind, raw in blocks:
        text = normalise(raw) if raw else ""
        if kind == "li":
            text = re.sub(r"^[-*o] +", "", text)
        if kind == "h":
            text = _NUMBERING.sub("", text)
            if text and is_heading(text):
                kept.append((kind, text))
        elif text and is_prose(kind, text):
            kept.append((kind, text))
        elif kept and kept[-1][0] != "code":
            kept.append(("code", ""))
    return kept if any(kind in ("p", "li", "td") for kind, _ in kept) else []


def document(blocks: list[Block], seen: set[bytes]) -> str:
    """Prose of one file, paragraphs separated by blank lines; "" if too little is left.

    Takes the result of `prose_blocks`. Paragraphs whose fingerprint is in `seen` are dropped and
    new ones are added to it.
    """
    out: list[Block] = []
    heading = ""
    for kind, text in blocks:
        if kind == "h":
            heading = text
            continue
        if kind == "code":
            # a sentence that announces what is gone goes too
            if out and out[-1][1].endswith(":"):
                _cut_announcement(out)
            continue
        mark = fingerprint(text)
        if mark in seen:
            continue
        seen.add(mark)
        if heading:
            if out and out[-1][1].endswith(":"):
                _cut_announcement(out)
            out.append(("h", heading))
        heading = ""
        out.append((kind, text))
    while out and (out[-1][0] == "h" or out[-1][1].endswith(":")):
        if out[-1][0] == "h":
            out.pop()
        else:
            _cut_announcement(out)
    if sum(kind in ("p", "td") for kind, _ in out) < 2 or sum(len(t) for _, t in out) < 400:
        return ""
    text = ""
    last = ""
    for kind, part in out:
        line = "- " + part if kind == "li" else part
        gap = "\n" if kind == "li" and last == "li" else "\n\n"
        text += (gap if text else "") + line
        last = kind
    return text


def _cut_announcement(out: list[Block]) -> None:
    kind, text = out.pop()
    ends = [m.end() for m in re.finditer(r"[.!?][\"')]*(?= [A-Z])", text)]
    if ends and kind != "h" and ends[-1] >= 60:
        out.append((kind, text[: ends[-1]]))
