import signal

import pytest

from mmx.cli.main import main
from tests import tiny


@pytest.fixture(autouse=True)
def interrupts():
    """Ctrl-C is heard, also where the tests run in a shell's background, which ignores it."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A tiny random model of 4 layers with a byte tokenizer and turn markers."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("tiny") / "model", tiny.config())


@pytest.fixture
def mmx(capsys):
    """Runs a command line; returns (exit code, stdout, stderr) and checks what holds for all."""
    def run(*argv):
        capsys.readouterr()
        code = main([str(one) for one in argv])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        if code == 2:
            sentence = err[err.rindex("mmx: "):]
            assert sentence.endswith((".\n", "?\n")) and len(sentence) > 20
        return code, out, err

    return run
