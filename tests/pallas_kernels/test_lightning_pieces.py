"""What the parts of a sequence hand on: which tokens are read for it, and how evenly."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.lightning_attention.parts import edges, givers
from pallas_kernels.lightning_attention.pieces import share_out
from tests.reference import lightning as f64

T, PARTS, PIECES, C = 131072, 8, 4, 64
SPAN = T // PARTS


def table(layer, reverse, lengths_B=None):
    slopes = f64.slopes(64, layer, 80)[::8]
    given = givers(PARTS, reverse)
    first_BP, end_BP = (x[:, given] for x in edges(lengths_B, 1, T, SPAN))
    got = share_out(jnp.asarray(slopes, jnp.float32), first_BP, end_BP, PIECES, T=T, C=C,
                    reverse=reverse)
    assert got.shape == (1, (PARTS - 1) * PIECES, 8, 4)
    return slopes, np.asarray(got).reshape(PARTS - 1, PIECES, 8, 4)


@pytest.mark.parametrize("layer, share", [(0, 0.06), (40, 0.11), (78, 0.67)], ids=str)
def test_eight_heads_in_eight_parts_read_few_tokens_twice(layer, share):
    _, pieces = table(layer, False)
    chunks = pieces[..., 1] - pieces[..., 0]
    assert 0 < chunks.sum() <= share * 8 * T / C
    # The longest piece is what a multiprocessor at least takes; at slope 0.007 7,900 tokens last.
    assert chunks.max() <= SPAN / C / PIECES and (layer == 78 or chunks.max() <= 7937 / C / PIECES)


@pytest.mark.parametrize("lengths", [None, 50_000, 16_384, 100, 0], ids=str)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("layer", [0, 40, 78], ids=str)
def test_pieces_hold_all_that_lasts_once_and_nothing_of_other_parts(layer, reverse, lengths):
    length = T if lengths is None else lengths
    slopes, pieces = table(layer, reverse, None if lengths is None else jnp.array([lengths]))
    for part, of_part in zip(range(PARTS)[givers(PARTS, reverse)], pieces, strict=True):
        first, end = (min(x * SPAN, length) for x in (part, part + 1))
        begin, stop = of_part[..., 0], of_part[..., 1]
        assert (of_part[..., 2] == first).all() and (of_part[..., 3] == end).all()
        assert (begin <= stop).all() and (begin[1:] == stop[:-1]).all()
        if first == end:
            assert (begin == stop).all()
            continue
        lasts = np.minimum(np.ceil(28 / slopes), end - first)
        assert (begin[0] * C >= first).all() and ((stop[-1] - 1) * C < end).all()
        if reverse:
            assert (begin[0] * C == first).all() and (stop[-1] * C >= first + lasts).all()
        else:
            assert (stop[-1] * C >= end).all() and (begin[0] * C <= end - lasts).all()
