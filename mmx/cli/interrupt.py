"""Work inside a compiler, which no signal reaches, that yet ends at Ctrl-C."""

import concurrent.futures
import os
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

from mmx.obs import log

T = TypeVar("T")


def interruptible(work: Callable[[], T], sentence: str) -> T:
    """Returns `work()`, done on a thread of its own, or raises what it raises.

    Python takes signals on the main thread alone, and between its own instructions: it waits here,
    where an interrupt tells `sentence` and ends the process with 130, past the hooks of an exit
    that would run beneath the compiler.
    """
    from mmx.cli.main import INTERRUPTED

    answer: concurrent.futures.Future = concurrent.futures.Future()

    def run() -> None:
        try:
            answer.set_result(work())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        concurrent.futures.wait([answer])
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        log.fail(sentence)
        os._exit(INTERRUPTED)
    return answer.result()
