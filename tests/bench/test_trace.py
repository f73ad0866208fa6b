"""Programs of a trace by name, and how a table tells them."""

from types import SimpleNamespace as Box

import pytest

from mmx.bench import report, trace
from tests.bench.test_report import FACTS, row


def gpu(number, *events):
    streams = [Box(name="Stream #13(Compute)", events=[Box(name=name, duration_ns=us * 1e3)
                                                       for name, us in events])]
    again = Box(name="XLA Ops", events=[Box(name="fusion", duration_ns=9e9)])
    return Box(name=f"/device:GPU:{number}", lines=[*streams, again])


HOST = Box(name="/host:CPU", lines=[Box(name="Stream", events=[Box(name="a", duration_ns=1e9)])])


def test_programs_are_the_mean_of_devices_and_steps_longest_first():
    found = trace.by_kernel([gpu(0, ("short", 1), ("long", 30), ("short", 3)),
                             gpu(1, ("short", 4), ("long", 10)), HOST], steps=2)
    assert found == {"busy_ms": pytest.approx(0.012), "launches": pytest.approx(1.25), "kernels": [
        {"kernel": "long", "per_step": 0.5, "us": 20.0, "us_per_step": 10.0},
        {"kernel": "short", "per_step": 0.75, "us": pytest.approx(8 / 3), "us_per_step": 2.0}]}
    assert trace.by_kernel([HOST], 1) is None


def test_a_table_has_the_longest_and_the_sum_of_the_rest():
    found = trace.by_kernel([gpu(0, *((f"program{i}", 100 - i) for i in range(20)))], 1)
    traced = row([3e-3], operation="decode", shape="b1c8", **found)
    lines = report.table([traced]).splitlines()
    assert "decode b1c8: 1.81 ms busy of 3, 20 programs" in lines
    shown = lines[lines.index("decode b1c8: 1.81 ms busy of 3, 20 programs") + 2:]
    assert len(shown) == report.MOST_KERNELS + 1 and shown[0].split() == [
        "100", "6", "%", "1", "100", "program0"]
    assert shown[-1].split() == ["676", "37", "%", "8", "(8", "others)"]
    assert "program19" in report.markdown(FACTS, [traced])
    untold = row([3e-3], kernels_error="It names none.")
    assert report.table([untold]).endswith("lightning_forward 1x131072h8: It names none.")
