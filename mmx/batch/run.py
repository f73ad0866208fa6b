"""The batch itself: reads the input, feeds the engine, journals answers, merges at the end."""

import dataclasses
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from mmx.batch import answers, journal, records
from mmx.engine.request import Event, Request, SamplingParams
from mmx.errors import UserError
from mmx.obs import log
from mmx.obs.progress import Progress

_WAIT_NOTICE_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a call of `run_batch` did, and where the whole batch stands.

    `answered`, `errors`, token counts and `seconds` are of this call and host; `records` counts the
    batch. `merged` tells that the output is complete, `failed` that all its records are errors.
    """

    records: int
    resumed: int
    answered: int
    errors: int
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    merged: bool
    failed: bool = False

    @property
    def tokens_per_s(self) -> float:
        return self.completion_tokens / self.seconds if self.seconds > 0 else 0.0


@dataclasses.dataclass(frozen=True)
class _Survey:
    """One reading of the input: its digest, record count, and the format of its first record."""

    sha256: str
    count: int
    kind: str


class Answerer(Protocol):
    """What a batch asks of a loaded model."""

    name: str  # of the model, for answers

    def encode(self, job: records.Job) -> list[int]:
        """Returns a record's prompt ids; raises UserError for one that cannot be answered."""

    def run(self, requests: Iterator[Request]) -> Iterator[Event]:
        """Answers requests, taking them as there is room; keys are record indexes."""

    def token_bytes(self, id: int) -> bytes:
        """Returns the UTF-8 bytes that a token stands for."""

    def tool_calls(self, job: records.Job, text: str) -> list[dict[str, Any]] | None:
        """Returns the function calls of an answer in OpenAI's form, None if there are none."""


def run_batch(start: Callable[[], Answerer], input: Path, output: Path, *,
              sampling: SamplingParams, settings: Mapping[str, Any],
              may_change: Mapping[str, Any] | None = None,
              restart: bool = False, host: int = 0, hosts: int = 1,
              barrier: Callable[[str], None] | None = None, together: bool = False) -> Summary:
    """Answers each record of a JSON Lines file once, however often the process is killed.

    Args:
      start: loads the model; not called when nothing is left to answer.
      input: records, of mmx's own format or OpenAI's batch format, in any mix.
      output: answers in the order of the input; complete when it exists.
      sampling: for records that do not say; the seed of a record without one is derived from its
        seed and the record's place.
      settings: whatever else the answers depend on (model, precision, …), as JSON values; a resume
        with others is refused.
      may_change: settings that the answers do not depend on (slots, …); a resume with others tells
        so.
      restart: discard what an earlier run left.
      host, hosts: this process answers records `i % hosts == host`; host 0 waits for the others'
        journals on the shared file system and merges. Another run may have another `hosts`.
      barrier: waits for all hosts, where they are one job.
      together: the hosts hold one model between them; all go through every record in step, and
        host 0 alone keeps the journal.
    Raises UserError for an unreadable input, or an output that belongs to other work. A record that
    cannot be answered is told on stderr with its line and has an error in its place in the output.
    """
    survey = _survey(input)
    if restart:
        if hosts > 1 and barrier is None:
            raise UserError("--restart cannot be told to several hosts at once.",
                            "One of them would discard what another has begun.",
                            f"Remove '{output}' and '{output}.*' by hand.")
        if host == 0:
            journal.discard(output)
        if barrier:
            barrier("discard")
    output.parent.mkdir(parents=True, exist_ok=True)
    new, fresh = not journal.state_path(output).exists(), False
    state = journal.claim(output, {
        "input_sha256": survey.sha256, "records": survey.count,
        "settings": {**settings, **_sampling_settings(sampling)},
        "may_change": dict(may_change or {}),
        "started": int(time.time())})
    mine = range(survey.count) if together else range(host, survey.count, hosts)
    if output.exists():
        journal.tidy(output)
        return Summary(survey.count, len(mine), 0, 0, 0, 0, 0.0, True, _all_failed(output))
    silent = together and host > 0
    done = journal.finished(output)
    if together:
        barrier("read")  # all leave out the same records: none is appended before
    path = journal.journal_path(output, host)
    book = _NoJournal() if silent else journal.Journal(path)
    try:
        run = _Run(start, input, survey, state, sampling, book, done, mine)
        run.answer_all()
    except UserError:  # no model, or no room for it: another try may have other settings
        fresh = new and hosts == 1 and not journal.finished(output)
        raise
    finally:
        book.close()
        if fresh:
            journal.discard(output)
    if host == 0 and hosts > 1 and not together:
        _await_hosts(output, survey.count, hosts)
    if barrier:
        barrier("answered")  # none opens a journal after this
    merged = host == 0
    if merged:
        journal.merge(output, range(survey.count))
        journal.tidy(output)
    return Summary(survey.count, run.resumed, run.answered, run.errors, run.prompt_tokens,
                   run.completion_tokens, run.seconds, merged, merged and _all_failed(output))


def _all_failed(output: Path) -> bool:
    with open(output, encoding="utf-8") as file:
        return all(answers.failed(json.loads(line)) for line in file)


def _sampling_settings(sampling: SamplingParams) -> dict[str, Any]:
    return {f"sampling.{name}": value for name, value in dataclasses.asdict(sampling).items()}


def _survey(path: Path) -> _Survey:
    """Reads the whole input once. Raises UserError when it is not a readable file with records."""
    digest, count, kind = hashlib.sha256(), 0, None
    try:
        with open(path, "rb") as file:
            for line in file:
                digest.update(line)
                if line.strip():
                    count += 1
                    kind = kind or _wording(line)
    except OSError as error:
        raise UserError(f"The input '{path}' cannot be read: {error.strerror.lower()}.",
                        "It is a JSON Lines file.", "Check the path and its permissions.") from None
    if not count:
        raise UserError(f"The input '{path}' holds no record.",
                        "Each line is a JSON object with a prompt or messages.",
                        'Write for example {"id": 1, "prompt": "Once upon a time"}.')
    return _Survey(digest.hexdigest(), count, kind or records.PLAIN)


def _wording(line: bytes) -> str | None:
    """The format of a line, or None if it cannot be read; unreadable lines are answered alike."""
    try:
        return records.read(line, 0, 1, SamplingParams()).kind
    except UserError:
        return None


def _await_hosts(output: Path, count: int, hosts: int) -> None:
    """Returns when the journals hold all records; names the hosts that are behind meanwhile."""
    told, tally = time.monotonic(), journal.Tally(output)
    while True:
        late = time.monotonic() - told > _WAIT_NOTICE_SECONDS
        if tally.count() >= count or late:
            done = journal.finished(output)
            if len(done) == count:
                return
            if late:
                told = time.monotonic()
                behind = sorted({index % hosts for index in range(count) if index not in done})
                log.note(f"waiting for {count - len(done):,} records of hosts "
                         f"{', '.join(map(str, behind))}")
        time.sleep(0.5)


class _NoJournal:
    """Of a host that answers in step with host 0, which keeps the journal."""

    def append(self, index: int, record: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


class _Run:
    """One host's pass over its records."""

    def __init__(self, start, input: Path, survey: _Survey, state: Mapping[str, Any],
                 sampling: SamplingParams, book: journal.Journal, done: set[int], mine: range):
        self._start, self._input, self._survey = start, input, survey
        self._created, self._id = state["started"], survey.sha256
        self._sampling, self._book, self._done, self._mine = sampling, book, done, mine
        self._jobs: dict[int, records.Job] = {}
        self._told: dict[str, list[int]] = {}  # kind of error -> its lines
        self.resumed = sum(index in done for index in mine)
        self.answered = self.errors = self.prompt_tokens = self.completion_tokens = 0
        self.seconds = 0.0

    def answer_all(self) -> None:
        if self.resumed == len(self._mine):
            return
        if self.resumed:
            log.note(f"resuming: {self.resumed:,} of {len(self._mine):,} records are done")
        answerer = self._start()
        began = time.monotonic()
        try:
            self._answer(answerer, began)
        finally:
            for first, *others in self._told.values():
                if others:
                    log.warn(f"{len(others):,} more records failed as line {first} did, to line "
                             f"{others[-1]}; the output tells each")
        self.seconds = time.monotonic() - began

    def _answer(self, answerer: Answerer, began: float) -> None:
        with Progress(len(self._mine), "records", title="batch", done=self.resumed) as progress:
            self._progress = progress
            for event in answerer.run(self._requests(answerer)):
                self.completion_tokens += len(event.new_ids)
                if event.result is not None:
                    self._write(answerer, self._jobs.pop(event.key), event.result)
                rate = self.completion_tokens / max(time.monotonic() - began, 1e-9)
                progress.update(int(event.result is not None), **{"tok/s": f"{rate:,.0f}"})

    def _requests(self, answerer: Answerer) -> Iterator[Request]:
        """Yields this host's open records; the engine takes them as it has room."""
        for index, line_number, line in self._lines():
            try:
                job = records.read(line, index, line_number, self._sampling, self._survey.kind)
                try:
                    prompt_ids = answerer.encode(job)
                except UserError as error:
                    raise records.RecordError(error, job.id, job.kind) from None
            except records.RecordError as error:
                self._refuse(error, index, line_number)
                continue
            self._jobs[index] = job
            yield Request(index, prompt_ids, job.sampling)

    def _lines(self) -> Iterator[tuple[int, int, bytes]]:
        index = 0
        with open(self._input, "rb") as file:
            for line_number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                if index in self._mine and index not in self._done:
                    yield index, line_number, line
                index += 1

    def _refuse(self, error: records.RecordError, index: int, line_number: int) -> None:
        same = self._told.setdefault(re.sub(r"[\d.,]+", "", str(error)), [])
        same.append(line_number)
        if len(same) == 1:
            log.warn(f"line {line_number}: {error}")
        self._book.append(index, answers.failure(error, line=line_number, index=index,
                                                 run=self._id))
        self.errors += 1
        self._progress.update(1)

    def _write(self, answerer: Answerer, job: records.Job, result) -> None:
        self._book.append(job.index, answers.answer(
            job, result, model=answerer.name, created=self._created, run=self._id,
            token_bytes=answerer.token_bytes, tool_calls=answerer.tool_calls(job, result.text)))
        self.answered += 1
        self.prompt_tokens += result.prompt_tokens
