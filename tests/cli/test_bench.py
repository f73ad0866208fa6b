"""The verb on this CPU at tiny shapes, in this process: complete records, files, and refusals."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys

import pytest

from mmx.bench import cases, peers, plot, run
from mmx.bench.records import FACTS
from mmx.errors import UserError

QUICK = ("--rounds=2", "--at_least_ms=1", "--compilation_cache=off")
TINY = cases.Sizes(forward=((1, 33), (2, 16), (1, 16, 2)), train=((1, 16),), packed=((3, 40),),
                   step=(1, 2), grouped=(24,), attention=((1, 16),), attention_step=((2, 16),),
                   context=(16, 32), chunk=16)


@pytest.fixture
def bench(mmx, monkeypatch):
    """`mmx bench` at tiny shapes, ceilings included; compiled programs stay where tests keep them.
    """
    monkeypatch.setattr(cases, "SMALL", TINY)
    monkeypatch.setattr("mmx.bench.ceilings.sizes", lambda full: (1 << 20, 128))
    monkeypatch.setattr("mmx.cli.bench.enable_compilation_cache", lambda directory: None)
    return lambda *argv: mmx("bench", *argv[:1], *QUICK, *argv[1:])


def complete(records, bench):
    """Checks every record; returns those beyond the ceilings."""
    assert [one["operation"] for one in records[:2]] == ["ceiling_copy", "ceiling_product"]
    for one in records:
        assert set(FACTS) <= set(one) and one["bench"] == bench and "error" not in one
        assert one["device"]["platform"] == "cpu" and one["method"]["rounds"] == 2
        assert len(one["samples_ms"]) == 2 and one["inner"] >= 1
        for name in ("median_ms", "rate", *(("floor_ms", "share_of_floor")
                                            if one not in records[:2] else ())):
            assert math.isfinite(one[name]) and one[name] > 0, (name, one)
    for one in records[2:]:
        copy, product = (one["ceilings"][name] for name in
                         ("copy_gb_per_s", "product_tflop_per_s"))
        amount = float(one["floor_formula"].split(" = ")[1].split()[0])
        rate = copy * 1e6 if one["rate_unit"] == "GB/s" else product * 1e9
        assert one["floor_ms"] == pytest.approx(amount / rate, rel=1e-3)
        assert one["share_of_floor"] == pytest.approx(one["floor_ms"] / one["median_ms"])
    return records[2:]


def test_kernels(bench, tmp_path):
    pytest.importorskip("matplotlib")
    code, out, err = bench("kernels", f"--output={tmp_path / 'out'}")
    assert code == 0 and "small shapes, since this is a CPU" in " ".join(out.split())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "results.jsonl", "table.md", "plot.png", "config.gin"}
    kept = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    rows = complete(kept, "kernels")
    found = {(one["operation"], one["shape"]) for one in rows}
    assert found == {
        ("lightning_forward", "1x33"), ("lightning_forward", "2x16"),
        ("lightning_forward", "1x16h2"), ("lightning_train", "1x16"),
        ("lightning_packed", "3in40"), ("lightning_decode", "b1"), ("lightning_decode", "b2"),
        ("lightning_decode_slots", "b1"), ("lightning_decode_slots", "b2"),
        ("grouped_gate_up", "t24"), ("grouped_down", "t24"), ("attention_prefill", "1x16"),
        ("attention_decode", "b2s16")}
    by = {op: {one["implementation"] for one in rows if one["operation"] == op} for op, _ in found}
    assert by["lightning_packed"] == {"auto", "auto/whole", "xla", "xla/whole"}
    assert {"auto", "ragged_dot", "tiled"} <= by["grouped_down"] and not any(
        "reference" in names or "pallas_tpu" in names for names in by.values())
    for one in rows:
        line = next(line for line in out.splitlines() if line.split()[:4] == [
            one["operation"], one["shape"], "f32", one["implementation"]])
        assert float(line.split()[4].replace(",", "")) == pytest.approx(one["median_ms"], rel=1e-3)
    assert "bench.subject = 'kernels'" in (tmp_path / "out/config.gin").read_text()


def test_context_and_named_implementations_as_json(bench):
    code, out, _ = bench("kernels", "--what=context", "--implementation=reference,xla", "--json")
    rows = complete([json.loads(line) for line in out.splitlines()], "kernels")
    assert code == 0 and [(one["shape"], one["implementation"]) for one in rows] == [
        (shape, name) for shape in ("1x16", "1x32") for name in ("reference", "xla")]
    code, out, _ = bench("kernels", "--what=context_layers", "--json")
    rows = complete([json.loads(line) for line in out.splitlines()], "kernels")
    assert code == 0 and [(one["shape"], one["implementation"], one["dims"]["chunk"])
                          for one in rows] == [("1x16", "auto", 16), ("1x32", "auto", 16)]
    code, out, _ = bench("kernels", "--shapes=b2,t24", "--json")
    assert {json.loads(line)["shape"] for line in out.splitlines()[2:]} == {"b2", "t24"}


@pytest.mark.parametrize("flags", [(), ("--quantize=int8",), ("--quantize=int8", "--turned")])
def test_period(bench, flags):
    code, out, _ = bench("period", "--prompts=7,40", "--prefill_chunk=16", "--json", *flags)
    rows = complete([json.loads(line) for line in out.splitlines()], "period")
    assert code == 0 and [one["shape"] for one in rows] == ["1x7", "1x40"]
    assert [one["dims"]["chunk"] for one in rows] == [7, 16]
    for one in rows:
        assert one["dtype"] == ("float32/int8" if flags else "float32")
        assert one["tokens_per_s"] == pytest.approx(one["dims"]["tokens"] * 1e3 / one["median_ms"])


def test_decode(bench):
    code, out, _ = bench("decode", "--batch=1,3", "--context=20", "--trace", "--json")
    rows = complete([json.loads(line) for line in out.splitlines()], "decode")
    assert code == 0 and [one["shape"] for one in rows] == ["b1c20", "b3c20"]
    assert rows[1]["tokens_per_s"] == pytest.approx(3e3 / rows[1]["median_ms"])
    assert all("names no programs" in one["kernels_error"] for one in rows)  # of a CPU


def test_check_alone(bench, monkeypatch):
    monkeypatch.setattr("mmx.bench.check.LENGTHS", (1,))
    code, out, _ = bench("kernels", "--check", "--rounds=0", "--implementation=xla,tiled", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and all(one["passed"] for one in rows[2:])
    assert {one["operation"] for one in rows[2:]} == {
        "check_lightning_attention", "check_grouped_matmul", "check_attention"}
    code, out, _ = bench("kernels", "--check", "--rounds=0", "--implementation=xla", "--json",
                         "--what=lightning_decode_slots,context")
    assert code == 0 and {json.loads(line)["operation"] for line in out.splitlines()[2:]} == {
        "check_lightning_attention"}
    monkeypatch.setattr("mmx.bench.check.LIMITS", {"float32": 1e-12})
    code, out, _ = bench("kernels", "--check", "--rounds=0", "--implementation=tiled")
    assert code == 1 and "FAILED" in out


def test_an_interrupted_check_reports_what_it_compared(bench, monkeypatch, tmp_path):
    from mmx.bench import check

    monkeypatch.setattr(check, "LENGTHS", (1, 65))
    judge, calls = check.norm_ratio, itertools.count()

    def interrupted(*args):
        if next(calls) == 12:  # two results of lightning attention at 1 token are whole
            signal.raise_signal(signal.SIGINT)
        return judge(*args)

    monkeypatch.setattr(check, "norm_ratio", interrupted)
    code, out, err = bench("kernels", "--check", "--rounds=0", "--implementation=xla",
                           f"--output={tmp_path}")
    assert code == 130 and not out
    assert "stopped after 2 of 32 comparisons" in err and "2 of 12" in err
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()][2:]
    assert [(one["trials"], one["planned"]) for one in rows] == [
        (2, 12), (0, 12), (0, 4), (0, 4)]
    assert not any(one["passed"] or one["failures"] for one in rows)


def test_a_failing_implementation_has_a_row_and_the_run_goes_on(bench, monkeypatch):
    from pallas_kernels.attention import api

    def broken(*args):
        raise MemoryError("This needs 7 TB. Have less.")

    monkeypatch.setitem(api._IMPLEMENTATIONS, "broken", broken)
    code, out, _ = bench("kernels", "--what=attention_prefill", "--implementation=broken,xla")
    assert code == 0 and "This needs 7 TB." in out and " xla " in out
    code, out, _ = bench("kernels", "--what=attention_prefill", "--implementation=broken", "--json")
    assert code == 1 and json.loads(out.splitlines()[-1])["error"] == "This needs 7 TB."


@pytest.mark.parametrize("argv, words", [
    ([], "There is no subject to measure. It is one of kernels, period, decode."),
    (["kernel"], "'kernel' is not a choice. It is one of kernels, period, decode. "
                 "Did you mean 'kernels'?"),
    (["kernels", "period"], "does not take the argument period"),
    (["kernels", "--quantize=int8"], "--quantize is not for 'mmx bench kernels'."),
    (["kernels", "--turned"], "--turned is not for 'mmx bench kernels'."),
    (["kernels", "--trace"], "--trace is not for 'mmx bench kernels'."),
    (["decode", "--trace", "--peers=transformers"], "--trace and --peers exclude each other."),
    (["decode", "--noturned"], "--turned has no int8 weights to turn."),
    (["period", "--check"], "--check is not for 'mmx bench period'."),
    (["decode", "--batch=1,x"], "--batch='1,x' is not a list of whole numbers."),
    (["period", "--prompts=0"], "--prompts='0' is not a list of whole numbers."),
    (["kernels", "--rounds=0"], "--rounds=0 measures nothing."),
    (["kernels", "--rounds=-1"], "out of range"), (["decode", "--context=0"], "out of range"),
    (["kernels", "--output=/dev/null"], "is not a folder"),
])
def test_refused_before_jax_is_there(mmx, monkeypatch, argv, words):
    monkeypatch.setitem(sys.modules, "jax", None)
    code, out, err = mmx("bench", *argv)
    assert (code, out) == (2, "") and words in err


@pytest.mark.parametrize("argv, words", [
    (["kernels", "--what=lightning"], "There is no operation 'lightning' to time."),
    (["kernels", "--shapes=1x7"], "There is no shape '1x7' here."),
    (["kernels", "--implementation=xl"], "Did you mean 'xla'?"),
    (["kernels", "--peers=torch"], "There is no peer 'torch'. Peers are fla, transformers."),
    (["kernels", "--peers=transformers"], "has no part in 'mmx bench kernels'"),
    (["period", "--model=/no/such"], "There is no model at '/no/such'"),
])
def test_refused(bench, argv, words):
    code, out, err = bench(*argv)
    assert (code, out) == (2, "") and words in err


def test_a_peer_that_is_not_there(bench, monkeypatch):
    monkeypatch.setitem(peers._NEEDS, "fla", (("no_such_module",), "pip install it"))
    code, out, err = bench("kernels", "--peers=fla")
    assert (code, out) == (2, "") and "'no_such_module' cannot be imported" in err
    assert "pip install it" in err


def test_without_matplotlib_all_else_is_there(bench, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = bench("kernels", "--shapes=t24", f"--output={tmp_path}")
    assert code == 0 and "pip install matplotlib" in err
    assert {path.name for path in tmp_path.iterdir()} == {"results.jsonl", "table.md",
                                                         "config.gin"}
    assert plot.main([str(tmp_path)]) == 2


@pytest.mark.parity
def test_transformers_takes_turns(tmp_path):
    """Real processes: two turns of each side, pooled."""
    pytest.importorskip("transformers")
    done = subprocess.run(
        [sys.executable, "-m", "mmx", "bench", "decode", "--batch=2", "--context=8", "--json",
         "--peers=transformers", "--rounds=2", "--at_least_ms=1", f"--output={tmp_path}"],
        capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["implementation"] for one in rows[2:]] == ["mmx", "transformers"]
    for one in rows[2:]:
        assert len(one["samples_ms"]) == 4 and one["median_ms"] > 0
        assert "--peers=transformers" in one["command"] and "torch" in one["versions"]


@pytest.mark.parametrize("ends", [130, 2], ids=["interrupt", "error"])
@pytest.mark.parametrize("told", [False, True], ids=["before", "after its record"])
def test_an_end_beside_a_peer_keeps_what_was_told(bench, monkeypatch, tmp_path, told, ends):
    from mmx.bench import turns

    _, out, _ = bench("decode", "--batch=1", "--context=8", "--json")
    ours = [json.loads(line) for line in out.splitlines()]

    def interrupted(*arguments):
        if told:
            arguments[-1].append(ours[2])
        if ends == 2:
            raise UserError("The process of transformers ended with code 1 and no figure.")
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(peers, "check", lambda names, subject: names)
    monkeypatch.setattr(turns, "ours", lambda config_gin, into: into.extend(ours))
    monkeypatch.setattr(turns, "transformers", interrupted)
    code, out, _ = bench("decode", "--batch=1", "--context=8", "--peers=transformers",
                         f"--output={tmp_path}")
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert code == ends and not out
    assert [(one["implementation"], one.get("error")) for one in rows[2:]] == [
        ("mmx", None), ("transformers", None if told else "No turn told a figure.")]
    assert all(row["samples_ms"] == ours[2]["samples_ms"] for row in rows[2:3 + told])


def test_jobs_by_device():
    small, full = (run.jobs(run.Plan("period"), big) for big in (False, True))
    assert [job.shape for job in full] == ["1x4096", "1x16384", "1x131072"]
    assert [job.chunk for job in full] == [4096, 16384, 16384]
    assert max(job.tokens for job in small) <= 4096
