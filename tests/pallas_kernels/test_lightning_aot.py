"""The TPU compiler's own word on the lightning kernels: they compile, and to how much code."""

import pytest

from benchmarks import tpu_kernels

pytestmark = pytest.mark.tpu_aot
# Bundles per token and head that a few dozen untuned lines need: 2.97 on v5e, 2.42 on v6e.
MOST = {"v5e": 2.2, "v5p": 2.2, "v6e": 1.7, "tpu7x": 1.7}


@pytest.mark.parametrize("chip", MOST)
def test_bundles_of_a_forward_and_a_backward_step(chip):
    forward, packed, backward = (
        tpu_kernels.row(chip, name) for name in ("forward", "packed", "backward"))
    for found in (forward, packed, backward):
        print(tpu_kernels.line(found))
        assert found["vmem_bytes"] < 16 << 20  # what a kernel gets unasked
        assert found["bytes_over_floor"] < 1.03
    assert forward["bundles_per_token_head"] <= MOST[chip]
    assert packed["bundles"] <= 1.1 * forward["bundles"]
    assert backward["bundles"] <= 2.6 * forward["bundles"]  # 2.5 times the products


@pytest.mark.parametrize("chip", ("v5e", "v6e"))
def test_decode_compiles(chip):
    assert tpu_kernels.row(chip, "decode")["bundles"] > 0
