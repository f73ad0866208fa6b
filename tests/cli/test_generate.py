import contextlib
import functools
import io
import json
import shutil
import sys

import numpy as np
import pytest

from mmx.cli.main import main
from mmx.config import ModelConfig
from mmx.errors import UserError
from mmx.model import forward
from mmx.obs.progress import Progress
from tests import tiny

TOOLS = [{"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}]


def run(mmx, checkpoint, *argv):
    return mmx("generate", f"--model={checkpoint}", "--max_tokens=6", *argv)


def report(mmx, checkpoint, *argv):
    code, out, err = run(mmx, checkpoint, "--json", *argv)
    assert code == 0, err
    return json.loads(out)


@pytest.fixture(scope="module")
def greedy(checkpoint):
    """The report on one greedy answer, that other tests compare with."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        main(["generate", f"--model={checkpoint}", "--max_tokens=6", "--json", "--logprobs=2",
              "--prompt=Once upon"])
    return json.loads(out.getvalue())


def test_text_streams_to_stdout_and_figures_to_stderr(mmx, checkpoint, greedy):
    code, out, err = run(mmx, checkpoint, "--prompt=Once upon")
    assert (code, out) == (0, greedy["text"] + "\n")
    config, figures = err.splitlines()
    assert config == f"config: generate model={str(checkpoint)!r} max_tokens=6 prompt='Once upon'"
    for words in ("9 → 6 tokens (length)", "loaded in", "first token", "tok/s", "peak memory"):
        assert words in figures


def test_ids_are_the_models_own_greedy_choice(checkpoint, greedy):
    config = ModelConfig.from_hf(json.loads((checkpoint / "config.json").read_text()))
    params = tiny.params(config, tiny.tensors(config))
    ids = [*b"Once upon", *greedy["ids"]]
    logits_BTV, _ = forward(config, params, np.array([ids], np.int32))
    assert np.argmax(logits_BTV[0, 8:-1], -1).tolist() == greedy["ids"]


def test_a_prompt_of_many_chunks_is_told_as_it_is_read(mmx, checkpoint, monkeypatch):
    monkeypatch.setattr("mmx.cli.session.Progress", functools.partial(Progress, every_s=0))
    code, out, err = run(mmx, checkpoint, "--prefill_chunk=16", "--prompt=" + "a" * 100)
    assert code == 0 and out
    told = [line for line in err.splitlines() if line.startswith("prompt: ")]
    assert [line.split(" tokens ")[0] for line in told] == [
        f"prompt: {16 * n} of 100" for n in range(1, 6)]


def test_json_report(greedy):
    assert set(greedy) == {"model", "text", "ids", "finish_reason", "usage", "timings", "memory",
                           "logprobs", "config"}
    assert greedy["usage"] == {"prompt_tokens": 9, "completion_tokens": 6, "total_tokens": 15}
    assert greedy["finish_reason"] == "length" and len(greedy["ids"]) == 6
    assert [one["id"] for one in greedy["logprobs"]] == greedy["ids"]
    for one in greedy["logprobs"]:
        assert len(one["top"]) == 2 and one["logprob"] == one["top"][0]["logprob"] < 0
    assert greedy["memory"]["host_peak_bytes"] > 1e7
    assert all(value >= 0 for value in greedy["timings"].values())


def test_sampling_flags_reach_the_sampler(mmx, checkpoint, greedy):
    hot = ("--prompt=Once upon", "--temperature=3")
    first, second = (report(mmx, checkpoint, *hot, f"--seed={seed}")["ids"] for seed in (1, 2))
    assert first != second and greedy["ids"] not in (first, second)
    assert report(mmx, checkpoint, *hot, "--top_k=1")["ids"] == greedy["ids"]
    stopped = report(mmx, checkpoint, hot[0], f"--stop_token_ids={greedy['ids'][2]}")
    assert stopped["finish_reason"] == "stop" and stopped["ids"] == greedy["ids"][:3]


def test_prompt_file_leaves_out_its_last_line_break(mmx, checkpoint, tmp_path, greedy):
    (tmp_path / "p.txt").write_text("Once upon\n")
    assert report(mmx, checkpoint, f"--prompt_file={tmp_path / 'p.txt'}")["ids"] == greedy["ids"]


@pytest.mark.parametrize("flags", [(), ("--prompt_file=-",)])
def test_prompt_from_stdin(mmx, checkpoint, monkeypatch, flags):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Once\n")))
    assert report(mmx, checkpoint, *flags)["usage"]["prompt_tokens"] == 4


def test_chat_format(mmx, checkpoint, tmp_path):
    chat = report(mmx, checkpoint, "--prompt=hi", "--chat")
    system = report(mmx, checkpoint, "--prompt=hi", "--system=be brief")
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    tools = report(mmx, checkpoint, "--prompt=hi", f"--tools={tmp_path / 'tools.json'}")
    counts = [found["usage"]["prompt_tokens"] for found in (chat, system, tools)]
    assert 2 < counts[0] < min(counts[1:])
    assert chat["tool_calls"] == []
    plain = report(mmx, checkpoint, "--prompt=hi", "--nochat")
    assert plain["usage"]["prompt_tokens"] == 2
    for flag in ("--system=be brief", f"--tools={tmp_path / 'tools.json'}"):
        code, _, err = mmx("generate", f"--model={checkpoint}", "--prompt=hi", "--nochat", flag)
        assert code == 2 and "--nochat and --" in err and "exclude each other" in err


def test_output_and_its_config_beside(mmx, checkpoint, tmp_path):
    target = tmp_path / "answer.txt"
    _, out, _ = run(mmx, checkpoint, "--prompt=ab", "--seed=7", f"--output={target}")
    assert target.read_text() == out
    saved = tmp_path / "answer.txt.config.gin"
    assert "generate.seed = 7" in saved.read_text()
    _, again, _ = mmx("generate", f"--gin_file={saved}")
    assert again == out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answer.txt",
                                                               "answer.txt.config.gin"]


def test_random_weights_need_no_checkpoint(mmx, checkpoint, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(checkpoint / name, tmp_path / name)
    argv = ("generate", f"--model={tmp_path}", "--prompt=a", "--json", "--max_tokens=3")
    assert mmx(*argv)[0] == 2
    code, out, _ = mmx(*argv, "--random_weights", "--ignore_eos")
    assert code == 0 and len(json.loads(out)["ids"]) == 3


def test_compilation_cache(checkpoint, monkeypatch, tmp_path):
    import os

    from mmx.cli.shared import enable_compilation_cache

    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    enable_compilation_cache()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "mmx" / "jax")
    assert (tmp_path / "mmx" / "jax").is_dir()
    enable_compilation_cache(str(tmp_path / "other"))
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "other")
    enable_compilation_cache("off")
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made .not a directory.. It is a folder"):
        enable_compilation_cache(str(tmp_path / "file" / "x"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    enable_compilation_cache()  # not named: goes without
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
