"""Start-up of a job of several processes: Cloud TPU, GKE, SLURM, or plain environment variables.

    MMX_COORDINATOR=host:port   where process 0 listens
    MMX_PROCESSES=4             how many there are
    MMX_PROCESS_ID=0            which this is
    MMX_TIMEOUT_S=300           how long to wait for the others at the start
    MMX_SILENCE_S=30            how long a process may be silent before it counts as lost

Importing this costs nothing: jax is imported once there are several processes.
"""

import ctypes
import dataclasses
import glob
import importlib.util
import os
import signal
import sys

from mmx.errors import HostError, UserError
from mmx.sharding import link
from mmx.sharding.watch import Watch

MODES = AUTO, OFF, ON = "auto", "off", "on"
TIMEOUT_S, SILENCE_S = 300.0, 30.0
# Exit code of a process that ends because another is lost: "try again" in sysexits.h.
LOST = HostError.exit_code
_VARIABLES = ("MMX_COORDINATOR", "MMX_PROCESSES", "MMX_PROCESS_ID")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where this process stands in its job; `devices` are local device ids, None for all."""

    coordinator: str
    processes: int
    process: int
    devices: tuple[int, ...] | None = None


class Pod:
    """The processes of a job, seen from one of them; a single process is a pod of one.

    Attributes: index, count, hosts (a name per process), host (this one's), is_main.
    """

    def __init__(self, index: int = 0, hosts: list[str] | None = None,
                 watch: Watch | None = None):
        self.index, self.hosts, self._watch = index, hosts or [link.hostname()], watch
        self.broken = False

    @property
    def count(self) -> int:
        return len(self.hosts)

    @property
    def host(self) -> str:
        return self.hosts[self.index]

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def barrier(self, name: str) -> None:
        """Waits for all processes, without a limit: a lost one ends the job."""
        if self._watch:
            self._watch.barrier(name)

    def fail(self, sentence: str) -> None:
        """Ends the others, who tell that this process failed; this one should end soon."""
        if self._watch:
            self.broken = True
            self._watch.fail(sentence)

    def finish(self) -> None:
        """Waits for the others' last step and leaves the job."""
        global _pod
        if self._watch:
            import jax

            self._watch.close()
            self._watch, _pod = None, None
            ctypes.CDLL(None).signal(signal.SIGABRT, None)
            jax.distributed.shutdown()


_pod: Pod | None = None


def current() -> Pod:
    """The pod that `start` made, or a pod of one."""
    return _pod or Pod()


def start(mode: str = AUTO, *, timeout_s: float | None = None,
          silence_s: float | None = None) -> Pod:
    """Joins this process to its job, before jax has touched a device.

    Args:
      mode: "auto" looks for the variables above, then for a cluster that jax knows, and otherwise
        stays alone; "on" refuses to stay alone; "off" stays alone.
      timeout_s: for the others to come; MMX_TIMEOUT_S, else 300 s.
      silence_s: how long a process may be silent; MMX_SILENCE_S, else 30 s. From then on this
        process ends with a sentence that names the lost one and exit code 75, at most that long
        after another has died, stopped or lost its network.

    Raises UserError for variables that are wrong, and processes that do not come, by name.
    """
    global _pod
    if mode not in MODES:
        raise UserError(f"distributed={mode!r} is not a choice.", f"It is {', '.join(MODES)}.", "")
    timeout_s = _seconds("MMX_TIMEOUT_S", TIMEOUT_S) if timeout_s is None else timeout_s
    silence_s = _seconds("MMX_SILENCE_S", SILENCE_S) if silence_s is None else silence_s
    place = None if mode == OFF else _from_variables() or _from_cluster(timeout_s)
    if place is None and mode == ON:
        raise UserError("--distributed=on finds no other process.",
                        f"It needs {', '.join(_VARIABLES)}, or a cluster: Cloud TPU, GKE, SLURM.",
                        "Set them, start by launch/local_pod.sh, or use --distributed=auto.")
    if place is None or place.processes == 1:
        return Pod()
    host = link.hostname()
    name, port = _address(place.coordinator)
    if place.process == 0:
        peers, hosts = link.gather(port, place.processes, host, timeout_s)
    else:
        peer, hosts = link.join((name, port), place.process, place.processes, host, timeout_s)
        peers = {0: peer}
    watch = Watch(place.process, hosts, peers, silence_s,
                       lambda sentence: _end(place.process, host, sentence))
    _on_abort(watch, place.process, host)
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            place.coordinator, place.processes, place.process, place.devices,
            cluster_detection_method="deactivate", initialization_timeout=int(max(timeout_s, 60)),
            # jax ends a process without a name for the lost one: it comes second.
            heartbeat_timeout_seconds=int(max(100, 3 * silence_s)), shutdown_timeout_seconds=60)
    except BaseException as error:
        watch.fail(str(error))
        raise
    _pod = Pod(place.process, hosts, watch)
    return _pod


def label(index: int, host: str) -> str:
    return f"[process {index} on {host}] "


def _end(index: int, host: str, sentence: str) -> None:
    """Ends this process from the watching thread; the main one may hang in a collective."""
    sys.stdout.flush()
    _say(index, host, sentence)
    os._exit(LOST)


def _say(index: int, host: str, sentence: str) -> None:
    os.write(2, f"mmx: {label(index, host)}{sentence}\n".encode())


def _on_abort(watch: Watch, index: int, host: str) -> None:
    """When process 0 dies, jax aborts the others at once: name it then, in place of a core dump.

    The handler is C's, not Python's, whose handlers run in the main thread and later.
    """
    def handler(number: int) -> None:
        if watch.process_0_gone():
            _say(index, host, watch.lost(0))
            os._exit(LOST)

    global _handler  # the library keeps its address
    _handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)
    ctypes.CDLL(None).signal(signal.SIGABRT, _handler)


def _seconds(name: str, default: float) -> float:
    text = os.environ.get(name, "")
    try:
        value = float(text or default)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise UserError(f"{name}={text} is out of range.", "It is a number of seconds above 0.",
                        f"Write for example {name}={default:g}.")
    return value


def _from_variables() -> Place | None:
    given = {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}
    if not given:
        return None
    if len(given) < len(_VARIABLES):
        missing = [name for name in _VARIABLES if name not in given]
        raise UserError(f"{', '.join(given)} {'is' if len(given) == 1 else 'are'} set and "
                        f"{', '.join(missing)} not.",
                        f"The three stand together: {', '.join(_VARIABLES)}.",
                        "Set them all, or none for one process.")
    processes = _whole("MMX_PROCESSES", given, 1, "how many processes there are, from 1")
    process = _whole("MMX_PROCESS_ID", given, 0, "this process's number, from 0")
    if process >= processes:
        raise UserError(f"MMX_PROCESS_ID={process} of MMX_PROCESSES={processes} is out of range.",
                        f"Ids count from 0 to {processes - 1}.", "Correct one of the two.")
    _address(given["MMX_COORDINATOR"])
    return Place(given["MMX_COORDINATOR"], processes, process)


def _whole(name: str, given: dict[str, str], low: int, rule: str) -> int:
    text = given[name].strip()
    if not text.isdecimal() or int(text) < low:
        raise UserError(f"{name}={text} is out of range.", f"It is {rule}.", "Correct it.")
    return int(text)


def _address(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"The coordinator '{coordinator}' is no address.",
                        "It is HOST:PORT, reachable from all processes.",
                        "Write for example MMX_COORDINATOR=10.0.0.1:8476.")
    return host.strip("[]"), int(port)


def _from_cluster(timeout_s: float) -> Place | None:
    """What jax's own detection finds; asked only where something hints at a cluster."""
    if not _hints_at_cluster():
        return None
    # jax offers no public way to ask before it connects.
    from jax._src.clusters import ClusterEnv

    try:
        address, processes, process, devices = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, int(timeout_s))
    except Exception as error:  # each cluster has its own
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise UserError(f"This looks like a cluster, and its processes cannot be found: {reason}",
                        "They are read from what Cloud TPU, GKE or SLURM tell.",
                        f"Set {', '.join(_VARIABLES)}, or give --distributed=off.") from error
    if None in (address, processes, process):
        return None
    return Place(address, processes, process, None if devices is None else tuple(devices))


def started_processes() -> int:
    """How many processes of this command a launcher has started, by what it set; asks nobody.

    A host of a TPU slice may run a command by itself, so its mere place there says nothing.
    """
    place, env = _from_variables(), os.environ
    if place is not None:
        return place.processes
    counts = (env.get("SLURM_STEP_NUM_TASKS", "1"), env.get("OMPI_COMM_WORLD_SIZE", "1"))
    return max(int(text) if text.isdecimal() else 1 for text in counts)


def _hints_at_cluster() -> bool:
    env = os.environ
    if env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1")) != "1":
        return "SLURM_STEP_NODELIST" in env
    if env.get("OMPI_COMM_WORLD_SIZE", "1") != "1" or "JOB_COMPLETION_INDEX" in env:
        return True
    names = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES", "")
    if names:
        return "," in names or env.get("MEGASCALE_NUM_SLICES", "1") != "1"
    return bool((glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))
                and importlib.util.find_spec("libtpu"))
