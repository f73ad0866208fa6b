"""Fixed-length rows out of documents or samples, each row a function of its index alone."""

import functools

import numpy as np

from mmx.errors import UserError

# Substreams of one seed, so that document and row orders are independent.
_DOCUMENTS, _ROWS = 1, 2


class PackedDocuments:
    """Documents laid end to end, epoch after epoch, cut into rows of `seq_len` tokens.

    No token is padded or dropped: rows 0 … k·num_rows - 1 in any order hold exactly the first
    k·num_rows·seq_len tokens of the stream. Each epoch shuffles the documents and each block of
    `num_rows` rows is visited in a shuffled order, so that a book does not fill one batch.
    Packing as in the paper (samples concatenated, no padding; arXiv 2501.08313, section 3.2.2).

    tokens: [n] integers, documents closed by EOS; ends: [docs] int64.
    """

    def __init__(self, tokens, ends, seq_len: int, seed: int = 0, shuffle: bool = True):
        self.tokens, self.ends, self.seq_len = tokens, np.asarray(ends, np.int64), seq_len
        self.lengths = np.diff(self.ends, prepend=0)
        self.total = int(self.ends[-1])
        self.num_rows = max(1, self.total // seq_len)
        self.seed, self.shuffle = seed, shuffle
        # The current and next epoch are in use at a boundary; rows of one block reach no further.
        self._epoch = functools.lru_cache(maxsize=3)(self._make_epoch)
        self._row_order = functools.lru_cache(maxsize=3)(self._make_row_order)

    def _make_epoch(self, epoch: int):
        count = len(self.lengths)
        order = (np.random.default_rng((self.seed, _DOCUMENTS, epoch)).permutation(count)
                 if self.shuffle else np.arange(count))
        starts = np.concatenate([[0], np.cumsum(self.lengths[order])])
        return order, starts

    def _make_row_order(self, block: int):
        return np.random.default_rng((self.seed, _ROWS, block)).permutation(self.num_rows)

    def place(self, index: int) -> int:
        """Which cut of the stream row `index` is."""
        if not self.shuffle:
            return index
        block, within = divmod(index, self.num_rows)
        return block * self.num_rows + int(self._row_order(block)[within])

    def fill(self, index: int, ids_S, starts_S, weights_T) -> None:
        """Writes row `index`: ids [seq_len + 1], start flags [seq_len + 1], loss weights [seq_len].

        weights_T[t] belongs to predicting ids_S[t + 1] and is 0 where that token starts another
        document.
        """
        want, at = len(ids_S), self.place(index) * self.seq_len
        starts_S[:] = False
        done = 0
        while done < want:
            epoch, within = divmod(at + done, self.total)
            order, starts = self._epoch(epoch)
            slot = int(np.searchsorted(starts, within, side="right")) - 1
            while done < want and slot < len(order):
                skip = within - int(starts[slot])
                doc = int(order[slot])
                length = int(self.lengths[doc])
                take = min(length - skip, want - done)
                first = int(self.ends[doc]) - length + skip
                ids_S[done:done + take] = self.tokens[first:first + take]
                if skip == 0:
                    starts_S[done] = True
                done += take
                within += take
                slot += 1
        weights_T[:] = ~starts_S[1:]
        starts_S[0] = True


class PackedSamples:
    """Whole generated samples laid into rows of `seq_len` tokens.

    sampler.sample(index, max_tokens) -> (ids, loss_mask): at most max_tokens ids and, for each,
    whether it is to be predicted. Row i uses samples i·slots …, so rows need no history. What
    stays free after the last sample that fits is filled by the head of the next one without
    loss on it: context, not padding.
    """

    slots = 64

    def __init__(self, sampler, seq_len: int, min_tokens: int = 128):
        self.sampler, self.seq_len = sampler, seq_len
        self.min_tokens = min(min_tokens, seq_len)

    def fill(self, index: int, ids_S, starts_S, weights_T) -> None:
        """Writes row `index`; arguments as in `PackedDocuments.fill`."""
        want = len(ids_S)
        starts_S[:] = False
        targets_S = np.zeros(want, np.float32)
        done = 0
        for slot in range(self.slots):
            room = want - done
            if not room:
                break
            whole = room >= self.min_tokens
            ids, mask = self.sampler.sample(index * self.slots + slot, max(room, self.min_tokens))
            take = min(len(ids), room)
            if not take:
                raise UserError("A recall sample is empty.", "Each holds at least one token.",
                                "Use longer rows or haystack documents.")
            ids_S[done:done + take] = ids[:take]
            if whole:
                targets_S[done:done + take] = mask[:take]
            starts_S[done] = True
            done += take
        if done < want:
            raise UserError(f"{self.slots} recall samples do not fill a row of {self.seq_len}.",
                            "Samples are a fair share of the row.",
                            "Raise the sampler's lengths or lower seq_len.")
        weights_T[:] = targets_S[1:] * ~starts_S[1:]
        starts_S[0] = True


def interleave(weights, slots: int = 1024) -> np.ndarray:
    """A cycle of source numbers that holds each source in proportion to `weights`, spread evenly.

    Smooth weighted round robin: at each slot the source most in arrears goes next. Shares are
    exact to one slot at every prefix. Raises UserError for weights that are negative or all zero.
    """
    share = np.asarray(weights, np.float64)
    if share.ndim != 1 or not share.size or (share < 0).any() or not share.sum() > 0:
        raise UserError(f"The mixture weights {list(weights)} are out of range.",
                        "They are at least 0 and not all 0.", "Give each source a share.")
    share = share / share.sum()
    owed = np.zeros_like(share)
    cycle = np.empty(slots, np.int32)
    for slot in range(slots):
        owed += share
        cycle[slot] = int(np.argmax(owed))
        owed[cycle[slot]] -= 1.0
    return cycle
