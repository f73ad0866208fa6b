"""Operation and parameter counts against the published totals of the release."""

import pytest

from mmx import flops
from mmx.config import preset


def test_release_counts():
    text01 = preset("text01")
    norms = 80 * 2 * 6144 + 70 * 8192 + 6144
    # 45.9 B active without embedding and head (norms counted), 47.17 B with the head.
    assert flops.active_params(text01) + norms == 47_174_113_280
    mixing = flops.forward_flops(text01, 131072) - 2 * flops.active_params(text01)
    lightning = 70 * 64 * 196_608
    assert mixing == lightning + 10 * 64 * 2 * 128 * 131072
    assert flops.train_flops(text01, 8192) == 3 * flops.forward_flops(text01, 8192)


def test_peaks_by_device_name():
    assert flops.peak_flops("NVIDIA H200") == pytest.approx(989e12)
    peaks = [flops.peak_flops(name) for name in ("TPU v5 lite", "TPU v5", "TPU v6e")]
    assert peaks == sorted(set(peaks))
    assert flops.peak_flops("cpu") == 0
