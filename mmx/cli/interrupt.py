"""Ctrl-C that ends a verb at once, with a sentence, even inside a compiler."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from mmx.obs import log

# Time for Python to raise the interrupt and leave in order, before the process is ended without it.
GRACE_S = 1.0


class Interrupted(KeyboardInterrupt):
    """An interrupt with its sentence: what is kept, how to go on."""


@contextlib.contextmanager
def interruptible(sentence: Callable[[], str]) -> Iterator[None]:
    """Raises `Interrupted(sentence())` at an interrupt, or ends the process with 130, saying it.

    Python takes signals between its own instructions, so a compiler or a long step would have to
    finish first. Beside it a thread hears of the signal at once; it ends what has not ended after
    `GRACE_S`, past the hooks of an exit that would run beneath the compiler. `sentence` is asked on
    that thread too, and so must not import anything. Outside the main thread this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    over = threading.Event()
    threading.Thread(target=_watch, args=(reader, over, sentence), daemon=True).start()
    before, hook = signal.set_wakeup_fd(writer, warn_on_full_buffer=False), sys.unraisablehook
    sys.unraisablehook = lambda lost: _tell_lost(lost, hook)
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(sentence()) from None
    finally:
        over.set()
        sys.unraisablehook = hook
        signal.set_wakeup_fd(before)
        os.close(writer)


def _tell_lost(lost, hook: Callable) -> None:
    """Passes on what Python lost in a callback, but for an interrupt: the watch knows of it."""
    if not issubclass(lost.exc_type, KeyboardInterrupt):
        hook(lost)


def _watch(reader: int, over: threading.Event, sentence: Callable[[], str]) -> None:
    from mmx.cli.main import INTERRUPTED

    while numbers := os.read(reader, 64):  # one byte for each signal
        if signal.SIGINT in numbers and not over.wait(GRACE_S):
            sys.stderr.write("\n")
            log.fail(sentence())
            for child in multiprocessing.active_children():
                child.terminate()
            os._exit(INTERRUPTED)
    os.close(reader)
