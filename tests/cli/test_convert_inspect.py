import json

import pytest

from tests import tiny


def test_inspect_a_preset_without_weights(mmx):
    code, out, _ = mmx("inspect", "--model=text01", "--layout=original", "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["count"], found["parameters"]) == (8243, 456_089_655_296)
    assert found["bytes"] == 2 * found["parameters"]
    assert set(found["tensors"][0]) >= {"name", "shape", "dtype", "bytes"}


def test_inspect_a_directory(mmx, checkpoint):
    code, out, _ = mmx("inspect", f"--model={checkpoint}")
    *rows, summary = out.splitlines()
    assert code == 0 and len(rows) == len(tiny.shapes(tiny.config()))
    assert "complete and in shape" in summary
    row = next(row for row in rows if row.startswith("lm_head.weight"))
    assert row.split() == ["lm_head.weight", "272×48", "float32", "51.0", "KiB"]
    assert mmx("inspect", f"--model={checkpoint}", "--check") == (0, summary + "\n", "")


@pytest.mark.parametrize("layout", ["transformers", "orbax"])
def test_convert_there_and_back(mmx, checkpoint, tmp_path, layout):
    there, back = tmp_path / "there", tmp_path / "back"
    code, _, err = mmx("convert", f"--model={checkpoint}", f"--output={there}",
                       f"--layout={layout}")
    assert code == 0 and f"wrote {there}" in err and "peak memory" in err
    assert "convert.layout" in (there / "operative_config.gin").read_text()
    code, out, _ = mmx("convert", f"--model={there}", f"--output={back}", "--json")
    assert code == 0 and json.loads(out)["parameters"] > 0
    assert mmx("inspect", f"--model={back}", "--check")[0] == 0
    argv = ("--prompt=Once", "--max_tokens=6", "--json")
    ids = [json.loads(mmx("generate", f"--model={path}", *argv)[1])["ids"]
           for path in (checkpoint, there, back)]
    assert ids[0] == ids[1] == ids[2]


def test_convert_to_int8(mmx, checkpoint, tmp_path):
    code, _, _ = mmx("convert", f"--model={checkpoint}", f"--output={tmp_path / 'q'}",
                     "--layout=orbax", "--quantize=int8")
    assert code == 0
    code, out, _ = mmx("generate", f"--model={tmp_path / 'q'}", "--prompt=Once", "--max_tokens=3")
    assert code == 0 and out
    code, _, err = mmx("convert", f"--model={checkpoint}", f"--output={tmp_path / 'x'}",
                       "--quantize=int8")
    assert code == 2 and "cannot hold int8" in err and not (tmp_path / "x").exists()
