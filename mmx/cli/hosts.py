"""Verbs of a job of several processes: how they join it, who speaks, how they end."""

import contextlib
import dataclasses
import os
import sys
import time
import traceback
from collections.abc import Iterator

from mmx.cli.settings import setting
from mmx.errors import UserError
from mmx.obs import log
from mmx.sharding import distributed

# Time for the news of a lost process to come before an error is taken for this process's own: a
# collective fails a moment before.
_NEWS_SECONDS = 3.0


@dataclasses.dataclass(frozen=True)
class HostSettings:
    """How a verb finds the other processes of its job."""

    distributed: str = setting(
        "auto", "Work as one of several processes, found by MMX_COORDINATOR, MMX_PROCESSES and "
        "MMX_PROCESS_ID or by the cluster (Cloud TPU, GKE, SLURM); 'on' refuses to run alone.",
        group="Hosts", choices=distributed.MODES)


def spans_processes(mesh: str | None) -> bool:
    """Whether a mesh needs more devices than this process has."""
    if not mesh:
        return False
    import jax

    from mmx.sharding.mesh import parse_mesh

    return parse_mesh(mesh).size > jax.local_device_count()


def refuse_several(verb: str) -> None:
    """Raises UserError where a launcher has started one of several processes of this verb."""
    count = distributed.started_processes()
    if count > 1:
        raise UserError(f"'mmx {verb}' is the work of one process, and {count} were started.",
                        "They would write the same files.", "Start it on one host alone.")


@contextlib.contextmanager
def joined(mode: str) -> Iterator[distributed.Pod]:
    """Joins the job, if there is one; at the end leaves it together, or ends all of it.

    Process 0 alone writes notes and owns stdout; an error is told by the process it happened in,
    with its id and host, and the others end with it in their last sentence.
    """
    pod = distributed.start(mode)
    if pod.count == 1:
        yield pod
        return
    log.set_process(pod.index, distributed.label(pod.index, pod.host))
    _own_stdout()
    if pod.is_main:
        log.note(f"{pod.count} processes on {', '.join(dict.fromkeys(pod.hosts))}")
    try:
        yield pod
        pod.finish()
    except BaseException as error:
        _end(pod, error)


def _end(pod: distributed.Pod, error: BaseException) -> None:
    """Tells the error and ends this process, past the hooks that wait for the others."""
    from mmx.cli.main import INTERRUPTED, worded

    if not isinstance(error, KeyboardInterrupt):
        time.sleep(_NEWS_SECONDS)  # the watching thread ends the process if another is lost
    code, sentence = worded(error)
    if sentence:
        log.fail(sentence)
    elif code != INTERRUPTED:
        sys.stderr.write(log.prefix())
        traceback.print_exception(error)
    sys.stderr.flush()
    pod.fail(sentence or f"{type(error).__name__}: {error}".splitlines()[0])
    os._exit(code)


def _own_stdout() -> None:
    """Keeps stdout for Python: libraries of the wire greet each other there."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
