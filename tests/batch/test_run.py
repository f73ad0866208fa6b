import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from mmx.batch import journal, records, run
from mmx.engine.request import SamplingParams
from mmx.errors import UserError
from tests.batch.stand_in import StandIn


def write(path, lines):
    path.write_bytes(b"".join((line if isinstance(line, bytes) else json.dumps(line).encode())
                              + b"\n" for line in lines))
    return path


def prompts(count):
    return [{"id": f"r{i}", "prompt": f"prompt {i}", "max_tokens": 1 + i % 5}
            for i in range(count)]


def batch(source, output, model=None, **options):
    model = model or StandIn()
    options = {"settings": {"model": "stand-in"}, "sampling": SamplingParams(seed=1), **options}
    return run.run_batch(lambda: model, source, output, **options)


def interrupt(*args):
    raise KeyboardInterrupt


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_are_in_input_order(tmp_path):
    source = write(tmp_path / "in.jsonl", prompts(20))
    summary = batch(source, tmp_path / "sub" / "out.jsonl")
    assert [line["id"] for line in lines(tmp_path / "sub" / "out.jsonl")] == [
        f"r{i}" for i in range(20)]
    assert (summary.records, summary.answered, summary.errors) == (20, 20, 0)
    assert summary.completion_tokens == sum(1 + i % 5 for i in range(20))
    assert sorted(path.name for path in (tmp_path / "sub").iterdir()) == [
        "out.jsonl", "out.jsonl.state.json"]


def test_usage_and_default_ids(tmp_path):
    source = write(tmp_path / "in.jsonl", [{"prompt": "abcd", "max_tokens": 3}, {"prompt": "e"}])
    batch(source, tmp_path / "out.jsonl")
    first, second = lines(tmp_path / "out.jsonl")
    assert (first["id"], second["id"]) == (0, 1)
    assert first["usage"] == {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}


@pytest.mark.parametrize("stops", [(0,), (1, 2), (5, 0, 9)])
def test_interrupted_runs_end_as_an_uninterrupted_one(tmp_path, stops):
    source = write(tmp_path / "in.jsonl", prompts(30))
    batch(source, tmp_path / "whole.jsonl")
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            batch(source, tmp_path / "out.jsonl", StandIn(stop_after=stop))
        assert not (tmp_path / "out.jsonl").exists()
    last = StandIn()
    summary = batch(source, tmp_path / "out.jsonl", last)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert (summary.resumed, len(last.answered)) == (sum(stops), 30 - sum(stops))


def test_a_finished_batch_is_not_done_again(tmp_path):
    source = write(tmp_path / "in.jsonl", prompts(3))
    batch(source, tmp_path / "out.jsonl")
    before = (tmp_path / "out.jsonl").stat().st_mtime_ns
    again = StandIn()
    assert batch(source, tmp_path / "out.jsonl", again).merged
    assert not again.answered and (tmp_path / "out.jsonl").stat().st_mtime_ns == before


def test_killed_between_merge_and_tidying(tmp_path):
    source, out = write(tmp_path / "in.jsonl", prompts(3)), tmp_path / "out.jsonl"
    batch(source, out)
    book = journal.Journal(journal.journal_path(out, 0))
    book.append(0, {"id": "stale"})
    book.close()
    batch(source, out)
    assert not journal.journal_paths(out) and lines(out)[0]["id"] == "r0"


def test_all_done_but_not_merged_loads_no_model(tmp_path, monkeypatch):
    source, out = write(tmp_path / "in.jsonl", prompts(4)), tmp_path / "out.jsonl"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(journal, "merge", interrupt)
        batch(source, out)
    assert len(journal.finished(out)) == 4 and not out.exists()
    summary = run.run_batch(lambda: pytest.fail("loaded"), source, out,
                            sampling=SamplingParams(seed=1), settings={"model": "stand-in"})
    assert summary.resumed == 4 and len(lines(out)) == 4


def test_restart_discards(tmp_path):
    source, out = write(tmp_path / "in.jsonl", prompts(5)), tmp_path / "out.jsonl"
    batch(source, out, settings={"model": "other"})
    with pytest.raises(UserError, match="model was 'other'"):
        batch(source, out)
    model = StandIn()
    batch(source, out, model, restart=True)
    assert len(model.answered) == 5


def test_a_changed_input_is_refused(tmp_path):
    source, out = write(tmp_path / "in.jsonl", prompts(5)), tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        batch(source, out, StandIn(stop_after=2))
    write(source, prompts(6))
    with pytest.raises(UserError, match="input is not the one"):
        batch(source, out)


def test_changed_sampling_is_refused(tmp_path):
    source, out = write(tmp_path / "in.jsonl", prompts(5)), tmp_path / "out.jsonl"
    batch(source, out)
    with pytest.raises(UserError, match="sampling.seed was 1 and is 2"):
        batch(source, out, sampling=SamplingParams(seed=2))


def test_what_answers_do_not_depend_on_may_change(tmp_path, capsys):
    source, out = write(tmp_path / "in.jsonl", prompts(5)), tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        batch(source, out, StandIn(stop_after=2), may_change={"slots": 8, "capacity": None})
    capsys.readouterr()
    summary = batch(source, out, may_change={"slots": 2, "capacity": None})
    assert (summary.resumed, summary.answered) == (2, 3)
    told = [line for line in capsys.readouterr().err.splitlines() if "slots" in line]
    assert len(told) == 1 and "slots was 8 and is 2: what is done stays" in told[0]


def test_a_state_of_an_older_version_goes_on_and_dtypes_that_are_known_must_agree(tmp_path):
    """Those held slots among the settings, and no dtype unless it was given."""
    source, out = write(tmp_path / "in.jsonl", prompts(5)), tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        batch(source, out, StandIn(stop_after=2),
              settings={"model": "m", "dtype": None, "slots": 8})
    state = json.loads(journal.state_path(out).read_text())
    del state["may_change"]
    journal.state_path(out).write_text(json.dumps(state))
    now = {"settings": {"model": "m", "dtype": "float32"}, "may_change": {"slots": 2}}
    assert batch(source, out, **now).resumed == 2
    state["settings"]["dtype"] = "bfloat16"
    journal.state_path(out).write_text(json.dumps(state))
    with pytest.raises(UserError, match="dtype was 'bfloat16' and is 'float32'"):
        batch(source, out, **now)


@pytest.mark.parametrize("hosts", [2, 3])
def test_hosts_share_the_records_and_host_0_merges(tmp_path, hosts):
    source, out = write(tmp_path / "in.jsonl", prompts(20)), tmp_path / "out.jsonl"
    batch(source, tmp_path / "whole.jsonl")
    models = [StandIn() for _ in range(hosts)]
    with ThreadPoolExecutor(hosts) as pool:
        calls = [pool.submit(batch, source, out, model, host=host, hosts=hosts)
                 for host, model in enumerate(models)]
    assert [call.result().merged for call in calls] == [True] + [False] * (hosts - 1)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert [sorted(model.answered) for model in models] == [
        list(range(host, 20, hosts)) for host in range(hosts)]


def test_a_batch_goes_on_with_another_number_of_hosts(tmp_path):
    source, out = write(tmp_path / "in.jsonl", prompts(21)), tmp_path / "out.jsonl"
    batch(source, tmp_path / "whole.jsonl")
    for host in (0, 1, 2):
        with pytest.raises(KeyboardInterrupt):
            batch(source, out, StandIn(stop_after=3), host=host, hosts=3)
    model = StandIn()
    batch(source, out, model)
    assert len(model.answered) == 21 - 9
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_broken_lines_are_told_and_the_rest_is_done(tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", [
        {"id": "a", "prompt": "x"}, b"", b'{"id": "b", "prompt": ', {"id": "c", "temperatur": 1},
        {"id": "d", "prompt": "x" * 2000}, {"id": "e", "prompt": "y"}])
    summary = batch(source, tmp_path / "out.jsonl")
    assert (summary.answered, summary.errors, summary.records) == (2, 3, 5)
    told = capsys.readouterr().err
    for words in ("line 3: The line is not JSON", "line 4: The key 'temperatur' is unknown",
                  "line 5: The prompt has 2000 tokens"):
        assert words in told
    found = lines(tmp_path / "out.jsonl")
    assert [(one["id"], "error" in one) for one in found] == [
        ("a", False), (None, True), ("c", True), ("d", True), ("e", False)]
    assert found[1]["line"] == 3 and "line 3" in found[1]["error"]


def test_errors_alone_are_a_failure_and_told_once(tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", [{"prompt": "x" * (20 + i)} for i in range(30)])
    assert batch(source, tmp_path / "out.jsonl", StandIn(limit=10)).failed
    told = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(told) == 2 and "line 1: The prompt has 20 tokens" in told[0]
    assert "29 more records failed as line 1 did, to line 30" in told[1]
    assert batch(source, tmp_path / "out.jsonl").failed  # known of a finished one, too
    write(source, [{"custom_id": "a", "url": records.COMPLETIONS, "body": {"prompt": "x" * 20}}])
    assert batch(source, tmp_path / "openai.jsonl", StandIn(limit=10)).failed
    assert not batch(source, tmp_path / "good.jsonl").failed


def test_a_model_that_does_not_load_leaves_nothing(tmp_path):
    def start():
        raise UserError("There is no room.")

    source, out = write(tmp_path / "in.jsonl", prompts(3)), tmp_path / "out.jsonl"
    options = {"sampling": SamplingParams(), "settings": {}}
    with pytest.raises(UserError, match="no room"):
        run.run_batch(start, source, out, **options)
    assert list(tmp_path.iterdir()) == [source]
    with pytest.raises(KeyboardInterrupt):
        run.run_batch(lambda: StandIn(stop_after=1), source, out, **options)
    with pytest.raises(UserError, match="no room"):
        run.run_batch(start, source, out, **options)
    assert len(journal.finished(out)) == 1 and journal.state_path(out).exists()


@pytest.mark.parametrize("make, words", [
    (lambda path: None, "no such file"),
    (lambda path: path.mkdir(), "is a directory"),
    (lambda path: path.write_text("\n \n"), "holds no record"),
])
def test_unreadable_input(tmp_path, make, words):
    make(tmp_path / "in.jsonl")
    with pytest.raises(UserError, match=words):
        batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl.state.json").exists()


def test_openai_answers(tmp_path):
    body = {"messages": [{"role": "user", "content": "hi"}], "model": "m", "max_tokens": 2}
    tools = [{"type": "function", "function": {"name": "f"}}]
    source = write(tmp_path / "in.jsonl", [
        {"custom_id": "c", "method": "POST", "url": records.CHAT, "body": body},
        {"custom_id": "t", "url": records.CHAT, "body": {**body, "tools": tools}},
        {"custom_id": "p", "url": records.COMPLETIONS,
         "body": {"prompt": "a", "logprobs": 2, "max_tokens": 2}},
        {"custom_id": "l", "url": records.CHAT,
         "body": {**body, "logprobs": True, "top_logprobs": 2}},
        {"custom_id": "bad", "url": records.CHAT, "body": {**body, "n": 2}},
        b"{"])
    batch(source, tmp_path / "out.jsonl")
    chat, tool, text, logs, bad, broken = lines(tmp_path / "out.jsonl")
    assert set(chat) == {"id", "custom_id", "response", "error"}
    assert (chat["custom_id"], chat["response"]["status_code"], chat["error"]) == ("c", 200, None)
    reply = chat["response"]["body"]
    assert (reply["object"], reply["model"]) == ("chat.completion", "m")
    assert reply["choices"][0]["message"]["role"] == "assistant"
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 2
    called = tool["response"]["body"]["choices"][0]
    assert called["finish_reason"] == "tool_calls"
    assert called["message"]["tool_calls"][0]["function"]["name"] == "f"
    body = text["response"]["body"]
    assert (body["object"], body["model"]) == ("text_completion", "stand-in")
    shown = body["choices"][0]["logprobs"]
    assert "".join(shown["tokens"]) == body["choices"][0]["text"]
    assert shown["text_offset"] == [0, 2] and len(shown["top_logprobs"][0]) == 2
    content = logs["response"]["body"]["choices"][0]["logprobs"]["content"]
    assert content[0]["bytes"] == list(content[0]["token"].encode())
    assert len(content[0]["top_logprobs"]) == 2
    assert (bad["custom_id"], bad["response"]["status_code"]) == ("bad", 400)
    assert "line 5" in bad["response"]["body"]["error"]["message"]
    assert (broken["custom_id"], broken["response"]["status_code"]) == (None, 400)


def test_openai_answers_are_equal_after_a_resume(tmp_path):
    source = write(tmp_path / "in.jsonl", [
        {"custom_id": f"{i}", "url": records.COMPLETIONS, "body": {"prompt": f"{i}"}}
        for i in range(9)])
    with pytest.raises(KeyboardInterrupt):
        batch(source, tmp_path / "out.jsonl", StandIn(stop_after=4))
    batch(source, tmp_path / "out.jsonl")
    batch(source, tmp_path / "whole.jsonl")
    found, whole = lines(tmp_path / "out.jsonl"), lines(tmp_path / "whole.jsonl")
    for one in found + whole:
        del one["response"]["body"]["created"]
    assert found == whole
    assert len({one["response"]["body"]["id"] for one in found}) == 9


def test_restart_on_several_hosts_is_refused(tmp_path):
    source = write(tmp_path / "in.jsonl", prompts(2))
    with pytest.raises(UserError, match="several hosts"):
        batch(source, tmp_path / "out.jsonl", restart=True, hosts=2)
