"""Generated recall tasks: a planted fact or a string that has to be copied out of the context.

A sample is made from (seed, index) alone. Haystacks are slices of text tokenised once; only the
short planted parts are tokenised per sample. Numbers are split between training and evaluation by
a hash, so that no evaluation number is ever trained on.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable, Sequence

import numpy as np

from mmx.errors import UserError

CITIES = (
    "Accra Adelaide Algiers Amman Amsterdam Ankara Antwerp Athens Auckland Baku Bangkok "
    "Barcelona Beirut Belgrade Bergen Berlin Bilbao Bogota Bologna Boston Brasilia Bremen "
    "Bristol Brussels Bucharest Budapest Cairo Calgary Canberra Caracas Cardiff Chennai "
    "Chicago Cologne Colombo Copenhagen Cordoba Cracow Dakar Dallas Delhi Denver Dhaka Doha "
    "Dresden Dublin Durban Edmonton Florence Geneva Genoa Ghent Glasgow Granada Graz Hamburg "
    "Hanoi Harare Havana Helsinki Houston Istanbul Jakarta Kabul Kampala Karachi Kiev "
    "Kingston Kyoto Lagos Lahore Leipzig Lima Lisbon Ljubljana London Lusaka Lyon Madrid "
    "Malaga Manila Maputo Marseille Melbourne Memphis Miami Milan Minsk Monaco Montreal "
    "Moscow Mumbai Munich Nairobi Naples Nicosia Odessa Oslo Ottawa Oxford Palermo Panama "
    "Paris Perth Porto Prague Quito Rabat Riga Rome Rotterdam Salzburg Santiago Seattle Seoul "
    "Seville Singapore Skopje Sofia Stockholm Sydney Tallinn Tampere Tbilisi Tehran Tokyo "
    "Toronto Toulouse Trieste Tripoli Tunis Turin Utrecht Valencia Vancouver Venice Vienna "
    "Vilnius Warsaw Wellington York Zagreb Zurich"
).split()
NAMES = (
    "Ada Alan Alice Amara Andrei Anna Arjun Barbara Ben Carla Chen Clara Daniel Diego Dmitri "
    "Edsger Elena Emil Emma Farid Fatima Frank Grace Greta Hana Hassan Helen Hugo Ian Ines "
    "Ivan Jack Jana Joan John Julia Kofi Kurt Lars Laura Leila Lena Linus Maria Mark Martin "
    "Maya Mei Nadia Nina Noah Olga Omar Oscar Paul Petra Priya Rosa Ruth Sam Sara Simon Sofia "
    "Tariq Thomas Uma Vera Victor Wei Yara Yusuf Zoe"
).split()
_ONSETS = "b c d f g h j k l m n p r s t v w z br cl dr fl gr kr pl qu sh sk st th tr zh".split()
_VOWELS = "a e i o u ai ee ou ia oa".split()
_CODAS = ["", "", "n", "r", "l", "m", "s", "t", "x", "nd", "rk", "sh", "lt", "ck"]
_NEEDLES = (
    # (planted sentence, question, lead-in of the answer); the first is the one evaluated
    (
        "The special magic {key} number is: {value}.",
        "What is the special magic {key} number?",
        "The special magic {key} number is:",
    ),
    ("The secret code for {key} is {value}.", "What is the secret code for {key}?",
     "The secret code for {key} is"),
    ("The password of {key} is: {value}.", "What is the password of {key}?",
     "The password of {key} is:"),
    ("Ticket {key} has the number {value}.", "Which number has ticket {key}?",
     "Ticket {key} has the number"),
    ("Note: the access key of {key} is {value}.", "What is the access key of {key}?",
     "The access key of {key} is"),
)  # fmt: skip
_EVAL_SHARE = 8


def is_eval_number(number: int) -> bool:
    """Whether a number is kept for evaluation: one in eight, by a hash of its value."""
    return (number * 2654435761 >> 11) % _EVAL_SHARE == 0


def _number(rng: np.random.Generator, evaluation: bool) -> str:
    while True:
        digits = int(rng.integers(5, 8))
        number = int(rng.integers(10 ** (digits - 1), 10**digits))
        if is_eval_number(number) == evaluation:
            return str(number)


def _nonsense(rng: np.random.Generator) -> str:
    parts = [
        _ONSETS[rng.integers(len(_ONSETS))] + _VOWELS[rng.integers(len(_VOWELS))]
        for _ in range(int(rng.integers(1, 4)))
    ]
    return "".join(parts) + _CODAS[rng.integers(len(_CODAS))]


def _name(rng: np.random.Generator) -> str:
    draw = rng.random()
    if draw < 0.35:
        return CITIES[rng.integers(len(CITIES))]
    if draw < 0.5:
        return NAMES[rng.integers(len(NAMES))]
    return _nonsense(rng).capitalize()


def _distinct(rng: np.random.Generator, count: int, make: Callable) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[make(rng)] = None
    return list(found)


def _random_string(rng: np.random.Generator) -> str:
    draw = rng.random()
    if draw < 0.3:
        text = rng.bytes(16).hex()
        return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))
    alphabet = string.ascii_letters + string.digits
    if draw < 0.5:
        alphabet = string.digits
    elif draw < 0.7:
        alphabet = string.ascii_lowercase
    count = int(rng.integers(6, 33))
    return "".join(alphabet[i] for i in rng.integers(len(alphabet), size=count))


class Haystack:
    """Tokenised text to cut haystacks from, with the places where a sentence may be planted.

    `docs` are texts or id sequences; they are joined by a blank line. Raises UserError when empty.
    """

    def __init__(self, tokenizer, docs: Sequence) -> None:
        self.tokenizer = tokenizer
        self._ends: dict[tuple[int, str], np.ndarray | None] = {}
        parts: list[np.ndarray] = []
        for doc in docs:
            if isinstance(doc, str):
                doc = tokenizer.encode(doc, allow_special=False)
            ids = np.asarray(doc)
            if len(ids):
                parts += self.closed(ids, "\n\n")
        if not parts:
            raise UserError(
                "The haystack holds no text.", "Recall tasks need some.", "Pass documents."
            )
        dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
        self.ids = np.concatenate(parts).astype(dtype)
        pieces = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
        line_end = np.array([p.endswith("\n") for p in pieces])
        stop = np.array([p.endswith((".", "?", "!")) for p in pieces])
        spaced = np.array([len(p) > 1 and p[0] == " " and p[1].isupper() for p in pieces])
        # 1: after a line end; 2: between two sentences of one paragraph; in front of token i + 1
        self.after = np.zeros(len(self.ids), np.int8)
        self.after[line_end[self.ids]] = 1
        self.after[:-1][stop[self.ids[:-1]] & spaced[self.ids[1:]]] = 2
        self._starts = np.flatnonzero(self.after == 1)[:-1] + 1
        if not len(self._starts):
            self._starts = np.zeros(1, np.int64)

    def closed(self, ids: np.ndarray, ending: str) -> list[np.ndarray]:
        """The parts of `ids` followed by `ending`, tokenised as one text at the seam."""
        last = int(ids[-1])
        key = (last, ending)
        if key not in self._ends or len(ending) > 2:
            piece = self.tokenizer.decode([last])
            whole = None if "\ufffd" in piece else self.tokenizer.encode(piece + ending)
            self._ends[key] = None if whole is None else np.asarray(whole)
        seam = self._ends.pop(key) if len(ending) > 2 else self._ends[key]
        if seam is None:
            return [ids, np.asarray(self.tokenizer.encode(ending))]
        return [ids[:-1], seam]

    def cut(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 [length] from the start of a random line on, and their `after` marks."""
        start = int(self._starts[rng.integers(len(self._starts))])
        if start + length > len(self.ids):
            start = max(0, len(self.ids) - length)
        ids = self.ids[start : start + length].astype(np.int32)
        after = self.after[start : start + length]
        while len(ids) < length:
            # a corpus shorter than the haystack repeats
            more = length - len(ids)
            ids = np.concatenate([ids, self.ids[:more].astype(np.int32)])
            after = np.concatenate([after, self.after[:more]])
        return ids, after


@dataclasses.dataclass(frozen=True)
class NeedlePrompt:
    """One evaluation prompt: token ids, the ids a right answer starts with, and where it lay."""

    ids: np.ndarray
    answer_ids: np.ndarray
    answer: str
    depth: float


class RecallSampler:
    """Deterministic recall samples: `sample(index, max_tokens)` depends on (seed, index) only.

    `haystack_docs`: texts or token-id sequences of the training corpus.
    """

    def __init__(self, tokenizer, haystack_docs: Sequence, seed: int = 0) -> None:
        self.tokenizer = tokenizer
        self.haystack = Haystack(tokenizer, haystack_docs)
        self.seed = seed
        self._kinds = (
            (0.34, self._needle), (0.16, self._many_needles), (0.16, self._pairs),
            (0.12, self._strings), (0.12, self._paragraph), (0.10, self._words),
        )  # fmt: skip
        self._cumulative = np.cumsum([share for share, _ in self._kinds])
        bos = tokenizer.id_of("<beginning_of_sentence>")
        self._eos = tokenizer.id_of("<end_of_sentence>")
        self._user = [bos, *tokenizer.encode("user name=user\n")]
        self._turn = [self._eos, *tokenizer.encode("\n"), bos]
        self._turn += tokenizer.encode("ai name=assistant\n")

    def sample(self, index: int, max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 [n] and a bool mask [n] of the answer's tokens, n <= max_tokens.

        Lengths are log-uniform from 64 to max_tokens. Raises UserError if max_tokens < 128.
        """
        if max_tokens < 128:
            raise UserError(
                f"max_tokens is {max_tokens}.", "A recall sample needs at least 128.", "Raise it."
            )
        rng = np.random.default_rng((self.seed, index))
        while True:
            length = int(np.exp(rng.uniform(np.log(64), np.log(max_tokens + 1))))
            kind = int(np.searchsorted(self._cumulative, rng.random() * self._cumulative[-1]))
            ids, mask = self._kinds[kind][1](rng, length, bool(rng.random() < 0.4))
            # lengths in characters are estimates: the rare sample that is too long is drawn anew
            if len(ids) <= max_tokens:
                return ids, mask

    # every task builds a frame (head, question, answer) and a context to put in it

    def _frame(self, question, lead, answer, chat):
        """Ids before the context, between it and the answer, and of the answer."""
        encode = self.tokenizer.encode
        if chat:
            # in a chat the lead-in is the model's own
            ask = [*encode(question), *self._turn]
            return self._user, ask, [*encode(f"{lead} {answer}"), self._eos]
        return [], encode(f"{question} {lead}"), [*encode(" " + answer), self._eos]

    @staticmethod
    def _join(frame, context):
        head, ask, tail = frame
        ids = np.concatenate([head, context, ask, tail]).astype(np.int32)
        mask = np.zeros(len(ids), bool)
        mask[len(ids) - len(tail) :] = True
        return ids, mask

    def _plant(self, rng, needles: list[str], size: int) -> np.ndarray:
        return plant(self.tokenizer, self.haystack, rng, needles, size)

    def _needle(self, rng, length, chat):
        return self._needles(rng, length, chat, 1)

    def _many_needles(self, rng, length, chat):
        return self._needles(rng, length, chat, int(rng.integers(2, max(3, min(9, length // 48)))))

    def _needles(self, rng, length, chat, count):
        form = _NEEDLES[0 if rng.random() < 0.6 else rng.integers(1, len(_NEEDLES))]
        keys = _distinct(rng, count, _name)
        coded = form is not _NEEDLES[0] and rng.random() < 0.3
        values = [_random_string(rng)[:12] if coded else _number(rng, False) for _ in keys]
        needles = [form[0].format(key=k, value=v) for k, v in zip(keys, values, strict=True)]
        question, lead = (part.format(key=keys[0]) for part in form[1:])
        answer = values[0] + "."
        frame = self._frame(question, lead, answer, chat)
        context = self._plant(rng, needles, length - sum(map(len, frame)))
        return self._join(frame, context)

    def _pairs(self, rng, length, chat):
        encode = self.tokenizer.encode
        mark = (": ", " = ", " -> ")[rng.integers(3)]
        rows: list[tuple[str, str]] = []
        room = length - 48
        while room > 0 or not rows:
            value = _number(rng, False) if rng.random() < 0.6 else _nonsense(rng)
            rows.append((_name(rng) if rng.random() < 0.5 else _nonsense(rng), value))
            room -= 3 + (len(rows[-1][0]) + 2 * len(value)) // 2
        rows = list(dict(rows).items())
        key, value = rows[rng.integers(len(rows))]
        intro = "Here is a list of names and values.\n\n"
        context = encode(intro + "".join(f"{k}{mark}{v}\n" for k, v in rows) + "\n")
        question, lead = f"What is the value of {key}?", f"{key}{mark}".rstrip()
        return self._join(self._frame(question, lead, value + ".", chat), context)

    def _strings(self, rng, length, chat):
        answer = ""
        while not answer or len(answer) < length - 96 and rng.random() < 0.7:
            answer += (" " if answer else "") + _random_string(rng)
        question = "Repeat the string."
        body = self.tokenizer.encode(f"String: {answer}\n\n")
        frame = self._frame(question, "String:", answer, chat)
        size = length - len(body) - sum(map(len, frame))
        fill = self._plant(rng, [], size) if size > 24 else []
        parts = [body, fill] if rng.random() < 0.5 else [fill, body]
        return self._join(frame, np.concatenate(parts))

    def _paragraph(self, rng, length, chat):
        size = max(16, min(length // 2 - 24, int(rng.integers(16, 257))))
        piece, _ = self.haystack.cut(rng, size)
        text = self.tokenizer.decode(piece.tolist()).strip().replace("\ufffd", "")
        question, lead = "Repeat the text.", "Text:"
        context = self.tokenizer.encode(f"Text: {text}\n\n")
        return self._join(self._frame(question, lead, text, chat), context)

    def _words(self, rng, length, chat):
        count = int(rng.integers(3, max(4, min(40, length // 12))))
        words = _distinct(rng, count, lambda r: _nonsense(r) if r.random() < 0.6 else _name(r))
        text = ", ".join(words) + "."
        question, lead = "What were the words?", "The words are:"
        body = self.tokenizer.encode(f"The words are: {text}\n\n")
        frame = self._frame(question, lead, text, chat)
        size = length - len(body) - sum(map(len, frame))
        fill = self._plant(rng, [], size) if size > 24 else []
        return self._join(frame, np.concatenate([body, fill]))


def plant(tokenizer, haystack: Haystack, rng, needles, size, depths=None) -> np.ndarray:
    """Ids int32 of a haystack slice with every needle on a sentence border, about `size` in all.

    `depths` in 0..1 says where each needle goes (random if None; 1 = last). The slice ends in a
    blank line. At most `size` ids, but never fewer than the needles need.
    """
    depths = rng.random(len(needles)) if depths is None else np.asarray(depths)
    inline = rng.random(len(needles)) < 0.5
    coded = [(tokenizer.encode(n + "\n\n"), tokenizer.encode(" " + n)) for n in needles]
    room = max(0, size - 2 - sum(max(map(len, pair)) for pair in coded))
    ids, after = haystack.cut(rng, room)
    borders = np.flatnonzero(after[:-1]) + 1
    lines = borders[after[borders - 1] == 1]
    last = [n for n, depth in zip(needles, depths, strict=True) if depth >= 1]
    cuts = []
    for pair, depth, same_line in zip(coded, depths, inline, strict=True):
        if depth >= 1:
            continue
        # its own paragraph, or inside one where sentences meet; the place nearest to the depth
        places = borders if same_line else lines
        want = depth * len(ids)
        at = int(places[np.abs(places - want).argmin()]) if len(places) else 0
        at = 0 if want < abs(at - want) else at
        cuts.append((at, pair[1] if at and after[at - 1] == 2 else pair[0]))
    cuts.sort(key=lambda cut: cut[0])
    parts, start = [], 0
    for at, planted in cuts:
        parts += [ids[start:at], planted]
        start = at
    ending = "\n\n" + "".join(n + "\n\n" for n in last)
    rest = ids[start:]
    # cutting a sentence short before a blank line must give the ids that the text itself gives
    parts += haystack.closed(rest, ending) if len(rest) else [tokenizer.encode(ending.lstrip())]
    return np.concatenate(parts).astype(np.int32)


def needle_prompts(
    tokenizer,
    haystack_ids: Sequence | Haystack,
    length_tokens: int,
    depths: Sequence[float],
    n: int,
    seed: int = 0,
    form: str = "plain",
) -> list[NeedlePrompt]:
    """`n` prompts per depth (0..1), prompt and answer together at most `length_tokens` tokens.

    `haystack_ids`: held-out documents (texts or id sequences) or a Haystack. `form`: "plain" ends
    in "The special magic {city} number is:", "chat" asks in the chat template and expects the
    answer to hold the number. Evaluation numbers only.
    """
    if form not in ("plain", "chat"):
        raise UserError(f"form is {form!r}.", "It is 'plain' or 'chat'.", "Pass one of them.")
    stack = haystack_ids
    if not isinstance(stack, Haystack):
        stack = Haystack(tokenizer, stack)
    encode = tokenizer.encode
    bos = tokenizer.id_of("<beginning_of_sentence>")
    eos = tokenizer.id_of("<end_of_sentence>")
    prompts = []
    for place, depth in enumerate(depths):
        for trial in range(n):
            rng = np.random.default_rng((seed, length_tokens, place, trial))
            key, number = _name(rng), _number(rng, True)
            needle, question, lead = (part.format(key=key, value=number) for part in _NEEDLES[0])
            if form == "plain":
                head, tail = [], encode(f"{question} {lead}")
                answer = encode(" " + number)
            else:
                head = [bos, *encode("user name=user\n")]
                tail = [*encode(question), eos, *encode("\n"), bos, *encode("ai name=assistant\n")]
                answer = encode(f"{lead} {number}")
            size = length_tokens - len(head) - len(tail) - len(answer)
            context = plant(tokenizer, stack, rng, [needle], size, [depth])
            ids = np.concatenate([head, context, tail]).astype(np.int32)
            prompts.append(NeedlePrompt(ids, np.asarray(answer, np.int32), number, float(depth)))
    return prompts
