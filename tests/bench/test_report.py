"""Tables for people from records: width, agreement with the JSON, files that are always whole."""

import json

import pytest

from mmx.bench import plot, records, report, summary
from mmx.bench.floors import Ceilings, Work, floor
from mmx.bench.timing import Timing
from mmx.errors import UserError

FACTS = {
    "bench": "kernels", "model": "text01", "command": "mmx bench kernels", "commit": "a" * 40,
    "seed": 0, "versions": {"mmx": "0.1.0", "jax": "0.10.2"},
    "device": {"kind": "A device", "platform": "gpu", "count": 8, "used": 1}, "method": {},
    "geometry": "text01: wide " * 12,
    "ceilings": {"copy_gb_per_s": 1000.0, "product_tflop_per_s": 10.0, "product_dtype": "float32"}}
CEILINGS = Ceilings(1e12, 1e13, "float32")


def row(seconds, name="xla", operation="lightning_forward", shape="1x131072h8", **more):
    timing = seconds if isinstance(seconds, str) else Timing(tuple(seconds), 7)
    return records.record(operation, shape, {"tokens": 512, "heads": 8, "head_dim": 4}, "bfloat16",
                          name, timing, floor(Work(2e9, "2e9"), CEILINGS), **more)


ROWS = [row([4e-3, 5e-3, 6e-3]), row("Out of memory: " + "much, " * 40 + "too much.", "mosaic_gpu"),
        row([2e-3], "triton/whole"), row([1e-3, 1.5e-3], tokens=3)]


def test_a_record_is_reckoned_from_its_samples():
    one = ROWS[0]
    assert (one["median_ms"], one["spread"], one["floor_ms"], one["share_of_floor"], one["rate"]
            ) == pytest.approx((5.0, 0.4, 2.0, 0.4, 400.0), rel=1e-12)
    assert one["rate_unit"] == "GB/s"
    assert records.measured(one).median == pytest.approx(5e-3)
    assert records.measured(ROWS[1]).startswith("Out of memory")
    assert ROWS[3]["tokens_per_s"] == pytest.approx(3 / 1.25e-3)


def test_table_is_aligned_and_narrow():
    lines = report.table(ROWS).splitlines()
    assert max(map(len, lines)) <= report.WIDTH
    end = lines[0].index(" ms") + 3
    assert all(line[end - 1].isdigit() and line[end] == " " for line in (lines[1], lines[3]))
    assert lines[2].endswith("…") and "Out of memory" in lines[2]
    assert max(map(len, report.heading(FACTS).splitlines())) <= report.WIDTH
    assert "1 of 8 devices" in report.heading(FACTS)


def test_markdown_says_what_json_says(tmp_path):
    made = report.Report(FACTS, tmp_path / "new" / "folder")
    made.add(ROWS[:2])
    made.add(ROWS[2:])
    kept = [json.loads(line) for line in
            (tmp_path / "new/folder/results.jsonl").read_text().splitlines()]
    assert kept == json.loads(json.dumps(made.rows)) and len(kept) == 4
    assert all(set(records.FACTS) <= set(one) for one in kept)
    lines = (tmp_path / "new/folder/table.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")]
             for line in lines if line.startswith("| lightning")]
    for one, found in zip(kept, cells, strict=True):
        shown = report.cells(one)
        assert found[:4] == shown[:4]
        if "error" in one:
            assert found[4] == "failed: " + one["error"]
        else:
            assert found[4:len(shown)] == shown[4:] and float(found[4]) == pytest.approx(
                one["median_ms"], rel=1e-3)
            assert found[-1] == one["floor_formula"]
    assert not [path for path in (tmp_path / "new/folder").iterdir() if "tmp" in path.name]


@pytest.mark.parametrize("value, text", [
    (12345.6, "12,346"), (1000, "1,000"), (999.94, "999.9"), (1.23456, "1.235"),
    (0.00012345, "0.0001234")])
def test_figure(value, text):
    assert report.figure(value) == text


def test_comparisons_have_a_table_of_their_own():
    check = {"operation": "check_attention", "implementation": "xla", "dtype": "float32",
             "trials": 3, "worst": 2e-7, "where": "T=1, out", "limit": 1e-5, "failures": [],
             "passed": True, "shape": "3 trials"}
    bad = {**check, "passed": False, "failures": ["T=1, out: error nan"], "dtype": "bfloat16"}
    text = report.table([check, bad, ROWS[0]])
    assert "FAILED: T=1, out: error nan" in text and text.count("\n\n") == 1
    stopped = {**check, "passed": False, "planned": 7}
    line = report.table([stopped]).splitlines()[1]
    assert "3 of 7" in line and line.endswith("stopped") and "passed" not in line
    assert "| attention | f32 | xla | 3 | 2e-07 | 1e-05 | T=1, out | passed |" in report.markdown(
        FACTS, [check, bad, ROWS[0]])


def test_nothing_measured_is_known():
    made = report.Report(FACTS, None)
    made.add([{**row([1e-3]), "operation": "ceiling_copy"}, ROWS[1]])
    assert not made.any_measured
    made.add([ROWS[0]])
    assert made.any_measured


@pytest.mark.parametrize("operation", ["context", "lightning_forward"])
def test_plot(tmp_path, operation):
    pytest.importorskip("matplotlib")
    rows = [{**row([1e-3], name, operation), **FACTS} for name in ("xla", "xla/whole", "auto")]
    plot.draw(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]


def test_nothing_to_plot(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match="nothing to draw"):
        plot.draw([{**ROWS[1], **FACTS}], tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())


def test_summary_takes_the_quickest(tmp_path, capsys):
    for name, rows in (("a", [*ROWS[:3], {**row([3e-3], "triton"), "check": 1}]),
                       ("b", [row("No.", operation="attention_decode")])):
        report.Report(FACTS, tmp_path / name).add(rows)
    assert summary.main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    kept = [line.split() for line in lines if line.startswith(("lightning", "attention"))]
    assert [(one[0], one[3]) for one in kept] == [("lightning_forward", "triton"),
                                                  ("attention_decode", "xla")]
    assert summary.main([]) == 2
