"""The command `mmx VERB --flag=value…`: finds the verb, parses, runs, and words every failure."""

import dataclasses
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import mmx
from mmx.errors import UserError, nearest

# Verb → module of mmx.cli and its line in the help. A module holds
#   Settings      frozen dataclass: each field is a flag and a gin parameter `VERB.field`
#   EXAMPLE       command lines for its help
#   run(call)     does the work with call.settings and returns the exit code (None is 0)
#   WORD          optional: the field of text that a word without a flag gives
#   CONFIGURABLES optional: further dataclasses by gin name, for `Settings` fields to refer to
# and imports nothing heavy at its top: `--help` and a mistyped flag answer before jax is loaded.
VERBS = {
    "generate": "write text after a prompt, or chat",
    "batch": "answer every record of a JSON Lines file",
    "train": "train on text files",
    "convert": "rewrite a checkpoint in another layout, format or precision",
    "inspect": "list the tensors of a checkpoint or preset",
    "plan": "tell whether a job fits a pod, and at what traffic",
    "bench": "measure kernels, prefill and decode on this machine",
}
INTERRUPTED = 130
BROKEN_PIPE = 141


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a verb.

    `config` is the operative configuration as gin text; saved beside a run's output, it replays
    the run by --gin_file.
    """

    verb: str
    settings: Any
    config: str

    def announce(self) -> None:
        """Prints what differs from the defaults, compactly, on stderr of process 0."""
        from mmx.obs import log

        defaults = {field.name: field.default for field in dataclasses.fields(self.settings)}
        changed = [f"{name}={value!r}" for name, default in defaults.items()
                   if (value := getattr(self.settings, name)) != default]
        log.note(f"config: {self.verb} " + (" ".join(changed) or "(all defaults)"))

    def save(self, path: str | os.PathLike) -> None:
        """Writes the operative configuration to `path`."""
        from mmx.batch.journal import write_text

        write_text(path, self.config)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (without the program's name) and returns its exit code.

    0 is success; 1 a check that failed, or a batch of errors alone; 2 a mistake in the input, told
    on stderr; 130 an interrupt; 141 a closed pipe.
    """
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except BaseException as error:
        code, sentence = worded(error)
        if code == INTERRUPTED:
            sys.stderr.write(f"\nmmx: {sentence}\n" if sentence else "\n")
        elif code == BROKEN_PIPE:
            _swallow_stdout()
        elif sentence is None:
            raise
        else:
            sys.stderr.write(f"mmx: {sentence}\n")
        return code


def worded(error: BaseException) -> tuple[int, str | None]:
    """Returns the exit code of a failure and its sentence; None where there is no good one."""
    if isinstance(error, UserError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, str(error) or None
    if isinstance(error, BrokenPipeError):
        return BROKEN_PIPE, None
    if isinstance(error, OSError):
        name = f"{error.filename!r}: " if error.filename else ""
        return UserError.exit_code, f"{name}{error.strerror or error}."
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if package not in ("", "mmx", "pallas_kernels"):
            return UserError.exit_code, (
                f"The Python package '{package}' is missing for {sys.executable}. mmx runs where "
                "its dependencies are installed. Activate that environment "
                "(. .venv/bin/activate), or write pip install -e . in the clone.")
    if isinstance(error, MemoryError):
        return UserError.exit_code, _OUT_OF_MEMORY
    if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
        return UserError.exit_code, (
            f"{_OUT_OF_MEMORY} The device says: {str(error).splitlines()[0][:200]}.")
    return 1, None


_OUT_OF_MEMORY = ("The memory of this machine is used up. Weights, cache and activations must fit "
                  "together. Shorten the prompt, lower --slots, or load with --quantize=int8.")


def console() -> None:
    """Entry point of the `mmx` script."""
    code = main()
    if code == INTERRUPTED:
        sys.stderr.flush()
        os._exit(code)  # a compiler's threads crash beneath the hooks of an exit
    sys.exit(code)


def verb_module(verb: str):
    """Imports the module of a verb."""
    return importlib.import_module(f"mmx.cli.{verb}")


def _dispatch(argv: list[str]) -> int:
    from mmx.cli import help as pages
    from mmx.sharding.absent import skip_absent_accelerators

    if not argv or argv[0] in ("--help", "-h", "-?", "help"):
        if argv[1:2] and argv[1] in VERBS:
            print(pages.verb_page(argv[1], verb_module(argv[1])))
        else:
            print(pages.front_page(VERBS))
        return 0
    if argv[0] in ("--version", "-V"):
        print(f"mmx {mmx.__version__}")
        return 0
    verb = argv[0]
    if verb.startswith("-"):
        raise UserError(f"There is no verb before '{verb}'.", f"Verbs are {', '.join(VERBS)}.",
                        "Write mmx VERB --flag=value.")
    if verb == "chat":
        raise UserError("There is no verb 'chat'.", "A chat is held by 'mmx generate' on a "
                        "terminal, where no prompt is given.", "Write mmx generate --model=DIR.")
    if verb not in VERBS:
        raise UserError(f"There is no verb '{verb}'.", f"Verbs are {', '.join(VERBS)}.",
                        nearest(verb, VERBS) or "'mmx --help' tells what each does.")
    module = verb_module(verb)
    if any(arg in ("--help", "-h", "--helpfull", "--helpshort") for arg in argv[1:]):
        print(pages.verb_page(verb, module))
        return 0
    call = _parse(verb, module, argv[1:])
    skip_absent_accelerators()
    return module.run(call) or 0


def _parse(verb: str, module, argv: list[str]) -> Call:
    from mmx.cli import arguments, bindings
    from mmx.cli.settings import check

    parsed = arguments.parse(verb, module.Settings, argv, getattr(module, "WORD", None))
    # A gin file may be shared by several verbs, so all their names are known to each.
    for name in VERBS if parsed.gin_files or parsed.gin_params else (verb,):
        each = verb_module(name)
        bindings.register({name: each.Settings, **getattr(each, "CONFIGURABLES", {})})
    settings = bindings.configure(verb, parsed.gin_files, parsed.gin_params, parsed.given,
                                  tuple(getattr(module, "CONFIGURABLES", ())))
    check(settings)
    return Call(verb, settings, bindings.operative())


def _swallow_stdout() -> None:
    """Points stdout at nothing, or the interpreter complains about the closed pipe at exit."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        pass
