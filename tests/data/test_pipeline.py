"""The mixture: batches by row number, over hosts, workers and resumes."""

import contextlib
import itertools
import multiprocessing
import os
import signal

import numpy as np
import pytest

from mmx.data import pipeline
from mmx.data.pipeline import SourceConfig
from mmx.errors import UserError
from tests.data.byte_tokenizer import EOS, ByteTokenizer, tokenizer_dir, write_jsonl

ROWS = 6


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name in ("a", "b"):
        write_jsonl(folder / f"{name}.jsonl", [name * n for n in range(3, 90, 7)])
    configs = [SourceConfig("a", files=(str(folder / "a.jsonl"),), weight=3),
               SourceConfig("b", files=(str(folder / "b.jsonl"),), weight=1, loss_weight=5)]
    return pipeline.prepare(configs, tokenizer_dir(folder / "tok"), ByteTokenizer(), EOS,
                            folder / "cache", seq_len=32, seed=1)


def take(plan, count, **kwargs):
    first = kwargs.pop("first_row", 0)
    batches = pipeline.batches(plan, first, kwargs.pop("rows", ROWS), **kwargs)
    try:
        return list(itertools.islice(batches, count))
    finally:
        batches.close()


def assert_same(batch, other):
    for name, one, two in zip(batch._fields, batch, other, strict=True):
        np.testing.assert_array_equal(one, two, err_msg=name)


def test_sources_are_mixed_by_weight_and_marked(plan):
    batches = take(plan, 40)
    source = np.concatenate([batch.source_B for batch in batches])
    assert abs((source == 1).mean() - 0.25) < 0.01
    for batch in batches[:5]:
        for row, number in enumerate(batch.source_B):
            letters = set(batch.tokens_BS[row].tolist()) - {EOS}
            assert letters == {ord("ab"[number]) + 4}
            assert set(batch.weights_BT[row].tolist()) <= {0.0, (1.0, 5.0)[number]}
    assert batches[0].tokens_BS.shape == (ROWS, 33) and batches[0].starts_BT.shape == (ROWS, 32)


def test_resuming_by_row_number_is_exact(plan):
    whole = take(plan, 6)
    for batch, other in zip(whole[4:], take(plan, 2, first_row=4 * ROWS), strict=True):
        assert_same(batch, other)


@pytest.mark.parametrize("hosts", [2, 3])
def test_hosts_share_out_each_batch(plan, hosts):
    parts = [take(plan, 3, process=host, processes=hosts) for host in range(hosts)]
    for step, batch in enumerate(take(plan, 3)):
        joined = pipeline.Batch(*(np.concatenate(arrays) for arrays in
                                  zip(*(part[step] for part in parts), strict=True)))
        assert_same(batch, joined)


def test_another_batch_size_goes_on_with_the_same_rows(plan):
    tokens = lambda batches: np.concatenate([batch.tokens_BS for batch in batches])  # noqa: E731
    np.testing.assert_array_equal(tokens(take(plan, 4)), tokens(take(plan, 2, rows=2 * ROWS)))


def test_worker_processes_give_the_same_batches(plan):
    for batch, other in zip(take(plan, 4), take(plan, 4, workers=2), strict=True):
        assert_same(batch, other)


def test_an_interrupt_is_left_to_the_process_that_asks(plan):
    """Ctrl-C reaches all processes of a terminal: a worker would die of it with a traceback."""
    batches = pipeline.batches(plan, 0, ROWS, workers=1, ahead=1)
    with contextlib.closing(batches):
        first = [next(batches)]
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGINT)
        for batch, other in zip([*first, next(batches), next(batches)], take(plan, 3), strict=True):
            assert_same(batch, other)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_refusals_name_the_setting(plan, tmp_path):
    with pytest.raises(UserError, match="6 rows does not divide over 4 hosts"):
        take(plan, 1, processes=4)
    path = str(write_jsonl(tmp_path / "d.jsonl", ["text"]))
    tokenizer = tokenizer_dir(tmp_path / "tok")
    twice = [SourceConfig("x", files=path), SourceConfig("x", files=path)]
    with pytest.raises(UserError, match="used once"):
        pipeline.prepare(twice, tokenizer, ByteTokenizer(), EOS, tmp_path, 32, 0)
    with pytest.raises(UserError, match="kind 'books'"):
        SourceConfig(kind="books")
    with pytest.raises(UserError, match="seq_len=1"):
        pipeline.prepare(twice[:1], tokenizer, ByteTokenizer(), EOS, tmp_path, 1, 0)
