"""Batches as a function of (configuration, row number): a mixture of sources, prefetched.

Plain indexing stands in for a loader library here: a batch depends on its first row number and
nothing else, so the whole iterator state is that one number. Resuming, and resuming on another
number of hosts or with another batch size, is exact without any worker's state.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmx.data import packing, sources
from mmx.errors import UserError

TEXT = "text"
RECALL = "recall"


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of the mixture.

    kind: "text" packs the documents of `files`; "recall" draws planted-needle samples whose
    haystacks are documents of `files`. weight: share of the tokens, relative to the others.
    loss_weight: factor on each of its target tokens in the loss.
    """

    name: str = "text"
    kind: str = TEXT
    files: tuple[str, ...] = ()
    weight: float = 1.0
    loss_weight: float = 1.0

    def __post_init__(self):
        files = (self.files,) if isinstance(self.files, str) else tuple(self.files)
        object.__setattr__(self, "files", files)
        if self.kind not in (TEXT, RECALL):
            raise UserError(f"Source '{self.name}' has kind {self.kind!r}.",
                            f"Kinds are '{TEXT}' and '{RECALL}'.", "Choose one of them.")
        if self.loss_weight <= 0:
            raise UserError(f"Source '{self.name}' has loss_weight={self.loss_weight}.",
                            "It must be above 0.", "To leave a source out, set weight=0.")


class Batch(NamedTuple):
    """Rows of one step: tokens_BS int32 (S = T + 1: inputs are [:, :T], targets [:, 1:]),
    starts_BT bool, weights_BT float32, source_B int32 (place in the mixture)."""

    tokens_BS: np.ndarray
    starts_BT: np.ndarray
    weights_BT: np.ndarray
    source_B: np.ndarray


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that a worker process needs to produce any row; holds paths, not data."""

    sources: tuple[SourceConfig, ...]
    caches: tuple[str, ...]
    tokenizer: str
    seq_len: int
    seed: int
    shuffle: bool = True


def prepare(configs, tokenizer_dir, tokenizer, eos_id: int, cache_dir, seq_len: int, seed: int,
            shuffle: bool = True,
            progress: Callable[[str, int, int], None] | None = None) -> Plan:
    """Tokenises what is not cached yet and returns the plan of the mixture.

    Raises UserError for missing files, files without text, and names used twice.
    """
    configs = tuple(configs)
    names = [config.name for config in configs]
    if len(set(names)) != len(names) or not names:
        raise UserError(f"The sources are named {names}.", "There is at least one, and each name "
                        "is used once.", "Set `name` in each source.")
    if seq_len < 2:
        raise UserError(f"seq_len={seq_len} is out of range.", "It must be at least 2.",
                        "The embedded model trains at 2048.")
    fingerprint = sources.tokenizer_fingerprint(tokenizer_dir)
    caches = []
    for config in configs:
        files = sources.expand_files(config.files)
        report = progress and (lambda done, total, name=config.name: progress(name, done, total))
        cache = sources.tokenize(files, tokenizer, eos_id, fingerprint, cache_dir, report)
        caches.append(str(Path(cache_dir) / cache.key))
    return Plan(configs, tuple(caches), str(tokenizer_dir), seq_len, seed, shuffle)


class Pipeline:
    """The rows of a mixture, by number.

    Rows are dealt to sources in a fixed cycle proportional to their weights, and each source
    counts its own rows from 0, so row n is the same whatever the batch size or host count.
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        self.caches = [sources.open_cache(path) for path in plan.caches]
        self.cycle = packing.interleave([source.weight for source in plan.sources])
        one_hot = self.cycle[:, None] == np.arange(len(plan.sources))
        self._before = np.concatenate([np.zeros((1, one_hot.shape[1]), np.int64),
                                       np.cumsum(one_hot, axis=0)])
        self.rows_of = [self._rows(i) for i in range(len(plan.sources))]

    def _rows(self, index):
        plan, cache, source = self.plan, self.caches[index], self.plan.sources[index]
        if source.kind == TEXT:
            return packing.PackedDocuments(cache.tokens, cache.ends, plan.seq_len,
                                           plan.seed + index, plan.shuffle)
        from mmx.data.recall import RecallSampler
        from mmx.text import load_tokenizer

        documents = [cache.document(i) for i in range(cache.num_docs)]
        sampler = RecallSampler(load_tokenizer(plan.tokenizer), documents, plan.seed + index)
        return packing.PackedSamples(sampler, plan.seq_len)

    def locate(self, row: int) -> tuple[int, int]:
        """(source number, row within that source) of row `row` of the mixture."""
        lap, slot = divmod(row, len(self.cycle))
        source = int(self.cycle[slot])
        return source, int(lap * self._before[-1, source] + self._before[slot, source])

    def rows(self, start: int, count: int) -> Batch:
        """Rows start … start + count - 1."""
        width = self.plan.seq_len + 1
        batch = Batch(np.empty((count, width), np.int32), np.empty((count, width), np.bool_),
                      np.empty((count, width - 1), np.float32), np.empty(count, np.int32))
        for i in range(count):
            source, row = self.locate(start + i)
            batch.source_B[i] = source
            self.rows_of[source].fill(row, batch.tokens_BS[i], batch.starts_BT[i],
                                      batch.weights_BT[i])
            batch.weights_BT[i] *= self.plan.sources[source].loss_weight
        return batch._replace(starts_BT=batch.starts_BT[:, :-1])


_worker: Pipeline | None = None


def _open_worker(plan: Plan):
    global _worker
    _worker = Pipeline(plan)


def _work(start: int, count: int) -> Batch:
    return _worker.rows(start, count)


def batches(plan: Plan, first_row: int, rows_per_step: int, *, process: int = 0,
            processes: int = 1, workers: int = 0, ahead: int = 4) -> Iterator[Batch]:
    """Endless batches from row `first_row` on; this host's share of each, in order.

    Host p of n takes rows p·rows_per_step/n … of every step. workers=0 prepares batches on one
    thread; workers=k on k processes. `ahead` batches are kept ready. Close the iterator to stop
    them. Raises UserError when rows_per_step does not divide by `processes`.
    """
    if rows_per_step % processes:
        raise UserError(f"A batch of {rows_per_step} rows does not divide over {processes} hosts.",
                        "Each host feeds the same number of rows.",
                        f"Choose a multiple of {processes}.")
    share = rows_per_step // processes
    if workers:
        # Spawned, not forked: the parent runs a multithreaded runtime.
        pool = concurrent.futures.ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), _open_worker, (plan,))
        work = _work
    else:
        pool = concurrent.futures.ThreadPoolExecutor(1)
        work = Pipeline(plan).rows
    pending: collections.deque = collections.deque()
    row = first_row + process * share
    try:
        while True:
            while len(pending) < max(1, ahead):
                with _interrupts_blocked():
                    pending.append(pool.submit(work, row, share))
                row += rows_per_step
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Worker processes that start within take no Ctrl-C: closing the iterator ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def default_workers() -> int:
    """Processes that prepare batches: most of the cores, none where there are only two."""
    return max(0, min(12, (os.cpu_count() or 1) - 3)) if (os.cpu_count() or 1) > 3 else 0
