"""How the processes of a job find each other: each keeps one TCP connection to process 0.

It is made on the coordinator's own port before jax binds that port, so no other has to be open
between hosts. One JSON object per line:

    to process 0   hello: process, processes, host · {} (alive) · at: name · fail: sentence
    from it        hosts: [names] · {} (alive) · go: name · end: sentence
"""

import json
import os
import select
import socket
import threading
import time

from mmx.errors import HostError, UserError

_VERSION = 1
LINGER_SECONDS = 5.0
_RULE = "All processes of a job start with one coordinator, one count and ids of their own."


class Peer:
    """One connection that carries lines; `heard` is when the last byte came."""

    def __init__(self, sock: socket.socket):
        self.sock, self.heard, self.closed = sock, time.monotonic(), False
        self._rest = b""
        self._lock = threading.Lock()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, message: dict) -> None:
        """Sends what the other side can take within seconds; a peer that cannot is found silent."""
        data = json.dumps(message).encode() + b"\n"
        until = time.monotonic() + LINGER_SECONDS
        with self._lock:
            while data and time.monotonic() < until:
                try:
                    data = data[self.sock.send(data):]
                except BlockingIOError:
                    time.sleep(0.05)
                except OSError:
                    return

    def hung_up(self) -> bool:
        """Whether the other side is gone, read or not; asks the kernel alone."""
        try:
            poll = select.poll()
            poll.register(self.sock.fileno(), getattr(select, "POLLRDHUP", 0))
            return bool(poll.poll(0))
        except (OSError, ValueError):
            return True

    def read(self) -> list[dict]:
        """Returns the whole lines that have come; sets `closed` at the end of the stream.

        Raises ValueError for what is not a JSON object.
        """
        try:
            data = self.sock.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            self.closed = True
            return []
        self.heard = time.monotonic()
        *lines, self._rest = (self._rest + data).split(b"\n")
        messages = [json.loads(line) for line in lines if line]
        if len(self._rest) > 1 << 16 or not all(isinstance(one, dict) for one in messages):
            raise ValueError("no message")
        return messages


def readable(peers, seconds: float) -> list[Peer]:
    """The open peers with something to read, after at most `seconds`."""
    poll = select.poll()
    by_fd = {peer.sock.fileno(): peer for peer in peers if not peer.closed}
    for fd in by_fd:
        poll.register(fd, select.POLLIN)
    return [by_fd[fd] for fd, _ in poll.poll(1000 * max(seconds, 0))]


def gather(port: int, processes: int, host: str, timeout_s: float) -> tuple[dict, list[str]]:
    """Process 0: returns process id → Peer, and all host names, when all have come.

    Raises UserError naming the ids that have not within `timeout_s`, and those given twice.
    """
    until = time.monotonic() + timeout_s
    listener = _listen(port, until)
    waiting: list[Peer] = []
    found: dict[int, Peer] = {}
    hosts = {0: host}
    fault = None
    with listener:
        while len(hosts) < processes and not fault and (left := until - time.monotonic()) > 0:
            listener.settimeout(min(left, 0.05 if waiting else 0.5))
            try:
                waiting.append(Peer(listener.accept()[0]))
            except TimeoutError:
                pass
            for peer in list(waiting):
                hello = _hello(peer)
                if peer.closed or hello is None and time.monotonic() - peer.heard > 5:
                    waiting.remove(peer)
                    peer.sock.close()
                elif hello is not None:
                    waiting.remove(peer)
                    process, theirs = hello["process"], hello["host"]
                    if hello["processes"] != processes:
                        fault = (f"Process {process} on {theirs} counts {hello['processes']} "
                                 f"processes and process 0 on {host} counts {processes}.")
                    elif process in hosts:
                        fault = (f"Two processes have the id {process}: one on {hosts[process]}, "
                                 f"one on {theirs}.")
                    found[process], hosts[process] = peer, theirs
    if not fault and len(hosts) < processes:
        missing = [i for i in range(processes) if i not in hosts]
        here = ", ".join(f"{i} on {hosts[i]}" for i in sorted(hosts))
        fault = (f"{listed('Process', missing)} of {processes} did not come within "
                 f"{timeout_s:g} s; there are {here}.")
    if fault:
        for peer in found.values():
            peer.send({"end": fault})
        raise HostError(fault, _RULE, "Look at the missing ones' logs, or give them more time by "
                        "MMX_TIMEOUT_S.")
    names = [hosts[i] for i in range(processes)]
    for peer in found.values():
        peer.send({"hosts": names})
    return found, names


def join(coordinator: tuple[str, int], process: int, processes: int, host: str,
         timeout_s: float) -> tuple[Peer, list[str]]:
    """Any other process: returns the Peer of process 0 and all host names.

    Raises UserError when process 0 cannot be reached within `timeout_s`, or sends all away.
    """
    until = time.monotonic() + timeout_s
    reason, address = "no answer", f"{coordinator[0]}:{coordinator[1]}"
    while (left := until - time.monotonic()) > 0:
        try:
            peer = Peer(socket.create_connection(coordinator, timeout=min(left, 5)))
        except OSError as error:
            reason = (error.strerror or str(error) or "no answer").lower()
            time.sleep(min(0.3, left))
            continue
        peer.send({"hello": _VERSION, "process": process, "processes": processes, "host": host})
        # Process 0 itself gives up after its own timeout, and then says who is missing.
        while not peer.closed and (left := until + LINGER_SECONDS - time.monotonic()) > 0:
            if not readable([peer], left):
                reason = "it is waiting for others"
                continue
            try:
                messages = peer.read()
            except ValueError:
                peer.closed = True
                break
            for message in messages:
                if "end" in message:
                    raise HostError(message["end"], _RULE, "Start them all anew.")
                if "hosts" in message:
                    return peer, message["hosts"]
        if peer.closed:  # another program, or process 0 on its way out
            reason = "it closed the connection"
        peer.sock.close()
        time.sleep(0.3)
    raise HostError(
        f"Process {process} on {host} cannot reach process 0 at {address} within {timeout_s:g} s "
        f"({reason}).", _RULE,
        "Check that process 0 runs on that host and that the port is open, or raise MMX_TIMEOUT_S.")


def _listen(port: int, until: float) -> socket.socket:
    until = min(until, time.monotonic() + 15)  # a job just ended may still hold the port
    while True:
        try:
            if socket.has_dualstack_ipv6():
                return socket.create_server(("", port), family=socket.AF_INET6, backlog=1024,
                                            dualstack_ipv6=True)
            return socket.create_server(("", port), backlog=1024)
        except OSError as error:
            if time.monotonic() > until:
                raise UserError(f"Port {port} cannot be opened: {error.strerror.lower()}.",
                                "Process 0 listens there for the others.",
                                "Choose another port for the coordinator.") from None
            time.sleep(0.5)


def _hello(peer: Peer) -> dict | None:
    """The first message of a process; anything else closes the connection."""
    try:
        for message in peer.read():
            if message.get("hello") == _VERSION and isinstance(message["host"], str):
                return {**message, "process": int(message["process"])}
            peer.closed = True
    except (ValueError, KeyError, TypeError):
        peer.closed = True
    return None


def listed(noun: str, ids) -> str:
    """"Process 3", "Processes 1, 2"; long lists are cut."""
    text = ", ".join(map(str, ids[:16])) + (f" and {len(ids) - 16} more" if len(ids) > 16 else "")
    return f"{noun}{'es' if len(ids) > 1 else ''} {text}"


def hostname() -> str:
    return os.environ.get("MMX_HOST") or socket.gethostname()
