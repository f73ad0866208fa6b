"""The case that reads one layer of a stack: outputs are compared before anything is timed."""

import pytest

from mmx.bench import cases, floors, kernels
from mmx.bench.timing import Method
from mmx.config import preset
from pallas_kernels.attention import api


@pytest.fixture
def case():
    made = cases.cases(preset("nano"), cases.SMALL, "float32")
    (found,) = (one for one in made if one.shape == "b4s1024l3")
    return found


def test_forms_for_single_cases_are_timed_in_theirs(monkeypatch, case):
    monkeypatch.setattr(kernels.dispatch, "platform", lambda: "gpu")
    assert {"cudnn", *api.BY_NAME} <= set(kernels.chosen(case.op, (), case.also))
    assert not set(api.BY_NAME) & set(kernels.chosen(case.op, ()))


def test_a_form_whose_output_differs_is_not_timed(monkeypatch, case):
    def wrong(*arguments):
        return 1.01 * api.reference.attention(*arguments)

    monkeypatch.setitem(api._IMPLEMENTATIONS, "cudnn", wrong)
    named = ("auto", "reference", "cudnn", "cudnn_paged")
    rows = {row["implementation"]: row for row in kernels.measure(
        case, named, Method(rounds=1, at_least_s=0), floors.Ceilings(1e11, 1e12, "float32"), 0)}
    assert rows["auto"]["median_ms"] > 0 and rows["reference"]["median_ms"] > 0
    assert rows["cudnn"]["error"] == "Its output is 0.01 off that of blocks in XLA."
    assert "needs a process that runs on an NVIDIA GPU" in rows["cudnn_paged"]["error"]
