"""Help, flags and gin: what is asked wrongly is answered before any heavy import."""

import os
import re
import subprocess
import sys

import pytest

from mmx import __version__
from mmx.cli import main as cli


def test_front_page_names_all_verbs(mmx):
    code, out, _ = mmx("--help")
    assert code == 0 and all(re.search(rf"^  {verb} ", out, re.M) for verb in cli.VERBS)
    assert mmx()[1] == out


def test_version(mmx):
    assert mmx("--version")[:2] == (0, f"mmx {__version__}\n")


@pytest.mark.parametrize("verb", list(cli.VERBS))
@pytest.mark.parametrize("columns", [80, 120])
def test_help_of_a_verb(mmx, monkeypatch, verb, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = mmx(verb, "--help")
    assert code == 0 and "example:\n  mmx " in out and "--gin_param=BINDING" in out
    flags = re.findall(r"^  --(?:\[no\])?(\w+)", out, re.M)
    assert len(set(flags)) == len(flags) >= 7
    prose = [line for line in out.splitlines() if not line.startswith("  ")]
    assert max(map(len, prose)) <= columns
    described = [line for line in out.splitlines() if line.startswith(" " * 30)]
    assert max(map(len, described)) <= columns


def test_every_setting_of_our_verbs_is_described():
    from mmx.cli import batch, convert, generate, inspect

    for module in (generate, batch, convert, inspect):
        for name, field in module.Settings.__dataclass_fields__.items():
            assert field.metadata.get("help"), f"{module.__name__}.{name}"


@pytest.mark.parametrize("argv, words", [
    (["genrate"], "There is no verb 'genrate'. Verbs are generate, batch, train, convert, inspect, "
                  "plan, bench. Did you mean 'generate'?"),
    (["zzz"], "'mmx --help' tells what each does."),
    (["generate", "--promt=x"], "mmx generate has no flag '--promt'. Did you mean '--prompt'?"),
    (["generate", "--prompt"], "--prompt"),
    (["chat"], "There is no verb 'chat'. A chat is held by 'mmx generate' on a terminal"),
    (["--model=nano", "generate"], "There is no verb before '--model=nano'. Verbs are generate, "),
    (["generate", "To", "install"], "mmx generate does not take the argument install. A text of "
                                    "several words stands in quotes."),
    (["generate", "--prompt=a", "b"], "does not take the argument b"),
    (["batch", "x"], "does not take the argument x. Every value is written --flag=value."),
    (["generate", "--temp=1"], "mmx generate has no flag '--temp'. Did you mean '--temperature'?"),
    (["generate", "--temperature=hot"], "--temperature=hot has the wrong type: it takes a number."),
    (["generate", "--max_tokens=1.5"], "--max_tokens=1.5 has the wrong type"),
    (["generate", "--max_tokens=0"], "max_tokens=0 is out of range"),
    (["generate", "--temperature=-1"], "temperature=-1.0 is out of range"),
    (["generate", "--top_p=0"], "top_p=0.0 is out of range"),
    (["generate", "--dtype=float8"], "--dtype='float8' is not a choice. It is one of float32, "
                                     "bfloat16."),
    (["generate", "--json=maybe"], "--json=maybe has the wrong type"),
    (["generate", "--max_host_bytes=lots"], "--max_host_bytes='lots' is not a size"),
    (["generate", "--max_host_bytes=1KiB"], "out of range"),
    (["generate", "--prompt="], "The prompt is empty."),
    (["generate", "--prompt=a", "--prompt_file=b"], "both given"),
    (["generate", "--prompt_file=/no/such/file"], "'/no/such/file' cannot be read: no such file"),
    (["generate", "--prompt_file=/"], "is a directory"),
    (["generate", "a", "--logprobs=2"], "--logprobs has no meaning without --json."),
    (["generate", "--prompt=a", "--tools=/no/tools"], "'/no/tools' cannot be read"),
    (["generate", "--gin_file=nope.gin"], "There is no gin file 'nope.gin'."),
    (["generate", "--gin_param=generat.seed=1"],
     "gin knows no name 'generat' (--gin_param=generat.seed=1). Did you mean 'generate'?"),
    (["generate", "--gin_param=generate.tempratur=1"],
     "gin name 'generate' has no parameter 'tempratur' (--gin_param=generate.tempratur=1). "
     "Did you mean 'temperature'?"),
    (["generate", "--gin_param=generate.seed"],
     "gin cannot read the configuration: Couldn't parse statement, expected ':' or '=' "
     "(--gin_param=generate.seed). A binding"),
    (["generate", "--gin_param=generate.model=nano"],
     "gin cannot read the value nano (--gin_param=generate.model=nano)."),
    (["generate", "--gin_param=generate.model='nano"], " (--gin_param=generate.model='nano)."),
    (["generate", "--gin_param=generate.stop=(1,"],
     "a bracket or a quote is not closed (--gin_param=generate.stop=(1,)."),
    (["generate", "--gin_param=generate.model=%WHICH"], "The gin macro %WHICH has no value."),
    (["generate", "--gin_param=max_tokens = 2"],
     "gin binds the macro 'max_tokens', which nothing uses. A parameter is bound as name.parameter "
     "= value. Write generate.max_tokens = …."),
    (["generate", "--gin_param=max_token=2"], "Did you mean 'max_tokens'?"),
    (["generate", "--gin_param=generate.model=@which()"], "gin knows no name 'which'"),
    (["generate", "--gin_param=include 'nope.gin'"], "There is no gin file 'nope.gin'"),
    (["generate", "--gin_param=import nope_nope"], "gin cannot read the configuration"),
    (["train", "--gin_param=Optimizer.peak_lr=1e-3"],
     "gin binds parameters of 'Optimizer', which nothing refers to."),
    (["generate", "--gin_param=generate.top_p=2"], "top_p=2 is out of range"),
    (["generate", "--gin_param=generate.json=3"], "--json=3 has the wrong type"),
    (["batch"], "There is no --input."),
    (["batch", "--input=a"], "There is no --output."),
    (["batch", "--input=./a", "--output=a"], "are the same file"),
    (["batch", "--host=1"], "is no share"),
    (["batch", "--host=2", "--hosts=2"], "host=2 of hosts=2 is no share"),
    (["batch", "--slots=0"], "--slots=0 is out of range. It must be 1 or more."),
    (["convert"], "There is no --output."),
    (["convert", "--layout=hf"], "--layout='hf' is not a choice"),
    (["inspect", "--layout=hf"], "--layout='hf' is not a choice"),
])
def test_mistakes_are_one_sentence(mmx, monkeypatch, tmp_path, argv, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "jax", None)  # its import would fail, and be seen
    code, out, err = mmx(*argv)
    assert (code, out) == (2, "") and words in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_name_without_its_verb_in_a_gin_file_is_told(mmx, tmp_path):
    path = tmp_path / "a.gin"
    # Macros for other verbs may stand unused in a file; names of parameters may not.
    path.write_text("OTHER = 3\ntop_p = 0.5\n")
    code, out, err = mmx("generate", f"--gin_file={path}")
    assert (code, out) == (2, "") and "Write generate.top_p = …." in err and "OTHER" not in err


@pytest.mark.parametrize("text, argv", [
    ("seed = 3\ntrain.seed = %seed", []), ("seed = 3\ngenerate.seed = %seed", ["--seed=4"]),
    ("seed = 3\ngenerate.stop = [('a', %seed)]", ["--stop=x"]),
    ("generate.seed = %seed", ["--gin_param=seed=3", "--gin_param=generate.seed=4"])], ids=str)
def test_a_macro_that_is_used_may_be_overruled(mmx, tmp_path, text, argv):
    """By a flag, a later binding, or as another verb's in a shared file."""
    path = tmp_path / "a.gin"
    path.write_text(text + "\n")
    code, _, err = mmx("generate", f"--gin_file={path}", *argv, "--top_p=2")
    assert code == 2 and "top_p=2.0 is out of range" in err  # what is looked at behind it


@pytest.mark.parametrize("text, line, words", [
    ("generate.tempratur = 1", 3, "gin name 'generate' has no parameter 'tempratur'"),
    ("generate:\n  tempratur = 1", 4, "gin name 'generate' has no parameter 'tempratur'"),
    ("generat.seed = 1", 3, "gin knows no name 'generat'"),
    ("generate.model = @which()", 3, "gin knows no name 'which'"),
    ("generate.top_k", 3, "Couldn't parse statement, expected ':' or '='"),
    ("generate.model = nano", 3, "gin cannot read the value nano"),
    ('generate.model = "nano', 3, "gin cannot read the configuration"),
    ('generate.stop = (\n"a", (1, 2),\n# no end', 3, "a bracket or a quote is not closed"),
    ("import nope_nope", 3, "No module named 'nope_nope'"),
    ("include 'nope.gin'", 3, "There is no gin file 'nope.gin'"),
])
@pytest.mark.parametrize("way", ["file", "include", "param"])
def test_a_mistake_in_a_gin_file_is_told_with_its_line(mmx, tmp_path, text, line, words, way):
    path, outer = tmp_path / "a.gin", tmp_path / "outer.gin"
    path.write_text(f"# for a test\ngenerate.seed = 1\n{text}\n")
    outer.write_text(f"generate.top_k = 1\ninclude '{path}'\n")
    given = {"file": f"--gin_file={path}", "include": f"--gin_file={outer}",
             "param": f"--gin_param=include '{path}'"}[way]
    code, _, err = mmx("generate", "--prompt=a", given)
    assert code == 2 and words in err and f" ({path}, line {line})" in err
    assert err.count("\n") == 1 and "outer" not in err


def call(*argv):
    return cli._parse(argv[0], cli.verb_module(argv[0]), list(argv[1:]))


def test_later_sources_win(tmp_path):
    first, second = tmp_path / "a.gin", tmp_path / "b.gin"
    first.write_text("generate.seed = 1\ngenerate.top_k = 1\ngenerate.max_tokens = 1\n"
                     "generate.min_p = 0.1\n")
    second.write_text("generate.top_k = 2\ngenerate.max_tokens = 2\ngenerate.min_p = 0.2\n")
    settings = call("generate", f"--gin_file={first}", f"--gin_file={second}",
                    "--gin_param=generate.max_tokens=3", "--gin_param=generate.min_p=0.3",
                    "--min_p=0.4").settings
    assert (settings.seed, settings.top_k, settings.max_tokens, settings.min_p) == (1, 2, 3, 0.4)


def test_repeated_and_boolean_flags():
    settings = call("generate", "--stop=a", "--stop=b", "--stop_token_ids=3", "--json",
                    "--noignore_eos", "--max_host_bytes=3GiB").settings
    assert (settings.stop, settings.stop_token_ids) == (("a", "b"), (3,))
    assert (settings.json, settings.ignore_eos, settings.max_host_bytes) == (True, False, 3 << 30)


@pytest.mark.parametrize("argv", [
    ("generate", "To install", "--seed=3"), ("generate", "--seed=3", "To install"),
    ("generate", "--seed", "3", "--", "To install")], ids=" ".join)
def test_a_prompt_needs_no_flag(argv):
    settings = call(*argv).settings
    assert (settings.prompt, settings.seed) == ("To install", 3)
    assert call("inspect", "text01").settings.model == "text01"


def test_nothing_is_left_of_an_earlier_call():
    call("generate", "--gin_param=generate.seed=9", "--top_k=5")
    assert (call("generate").settings.seed, call("generate").settings.top_k) == (0, 0)


def test_the_operative_config_replays_the_call(tmp_path):
    first = call("generate", "--gin_file=run/generate.gin", "--gin_file=model/period.gin",
                 "--prompt=it's \"so\"\nü", "--stop=x", "--seed=4")
    (tmp_path / "saved.gin").write_text(first.config)
    again = call("generate", f"--gin_file={tmp_path / 'saved.gin'}")
    assert again.settings == first.settings


@pytest.mark.parametrize("name", ["run/generate.gin", "configs/run/batch.gin", "model/text01.gin"])
def test_shipped_configs_are_found_from_anywhere(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    call("generate" if "batch" not in name else "batch", f"--gin_file={name}")


def test_every_shipped_config_is_read():
    from mmx.cli import bindings

    names = bindings.shipped()
    assert {"base.gin", "model/nano.gin", "run/generate.gin", "run/batch.gin"} <= set(names)
    for name in names:
        verb = name.removeprefix("run/").removesuffix(".gin")
        call(verb if verb in cli.VERBS else "train" if verb == "nano" else "generate",
             f"--gin_file={name}")


def test_announcement_is_what_differs(capsys):
    call("generate", "--prompt=hi", "--top_k=0", "--seed=3").announce()
    assert capsys.readouterr().err == "config: generate seed=3 prompt='hi'\n"


def test_a_saved_config_is_whole(tmp_path):
    one = call("generate", "--prompt=hi")
    one.save(tmp_path / "c.gin")
    assert (tmp_path / "c.gin").read_text() == one.config
    assert [path.name for path in tmp_path.iterdir()] == ["c.gin"]


@pytest.mark.parametrize("error, code, words", [
    (KeyboardInterrupt(), 130, ""),
    (BrokenPipeError(), 141, ""),
    (PermissionError(13, "Permission denied", "/x/y"), 2, "'/x/y': Permission denied"),
    (OSError(28, "No space left on device"), 2, "No space left on device"),
    (ModuleNotFoundError("No module named 'gin.x'", name="gin.x"), 2, "package 'gin' is missing"),
    (MemoryError(), 2, "The memory of this machine is used up."),
    (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes"), 2,
     "Shorten the prompt"),
])
def test_failures_of_the_machine_are_sentences(mmx, monkeypatch, error, code, words):
    def fail(call):
        raise error

    monkeypatch.setattr(cli.verb_module("inspect"), "run", fail)
    monkeypatch.setattr(cli, "_swallow_stdout", lambda: None)
    found, _, err = mmx("inspect")
    assert found == code and words in err


@pytest.mark.parametrize("error", [
    RuntimeError("a fault of ours"),
    ModuleNotFoundError("a fault of ours", name="mmx.nothing"),
])
def test_other_failures_are_not_hidden(mmx, monkeypatch, error):
    def fail(call):
        raise error

    monkeypatch.setattr(cli.verb_module("inspect"), "run", fail)
    with pytest.raises(type(error), match="a fault of ours"):
        mmx("inspect")


@pytest.mark.parametrize("words", [["generate", "To install"], ["inspect"]])
def test_without_its_dependencies_the_way_to_them_is_told(words):
    done = subprocess.run([sys.executable, "-S", "-m", "mmx", *words], capture_output=True,
                          text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"mmx: The Python package '\w+' is missing for .* mmx runs where its "
                        r"dependencies are installed\. Activate .* in the clone\.\n", done.stderr)


def test_help_and_mistakes_load_nothing_heavy():
    code = ("import sys, mmx.cli.main as m\n"
            "m.main(['--help']); m.main(['generate', '--help']); m.main(['batch', '--help'])\n"
            "m.main(['generate', '--x=1']); m.main(['generate', '--prompt='])\n"
            "print(sorted({'jax', 'flax', 'numpy', 'tqdm', 'tokenizers'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_module_entry_and_closed_pipe():
    """`python -m mmx … | head -1` ends quietly."""
    done = subprocess.run(
        f"{sys.executable} -m mmx inspect --model=text01 --layout=original | head -1; "
        "echo ${PIPESTATUS[0]}", shell=True, executable="/bin/bash", capture_output=True, text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"}, timeout=120)
    assert done.stderr == "" and done.stdout.splitlines()[0].startswith("lm_head") or (
        done.stdout.splitlines()[0].startswith("model."))
    assert done.stdout.splitlines()[1] == "141"
