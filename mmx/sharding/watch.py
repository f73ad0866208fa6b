"""Who of a running job is still alive, and barriers without a time limit."""

import threading
import time
from collections.abc import Callable

from mmx.sharding.link import LINGER_SECONDS, Peer, readable

_BEAT_SECONDS = 1.0  # or less, so that several fall into a silence
_LAST = "last"  # the barrier after which nobody is watched


class Watch:
    """Keeps the connections of a running job and calls `on_end(sentence)` when it is lost.

    A process is lost when its connection closes before `close`, or brings nothing for `silence_s`
    (a stopped process, a frozen host, a cut cable). Process 0 sees all others, tells them, and
    ends last; the others see process 0.
    """

    def __init__(self, index: int, hosts: list[str], peers: dict[int, Peer], silence_s: float,
                 on_end: Callable[[str], None]):
        self.index, self.hosts, self.peers = index, hosts, peers
        self._silence, self._on_end = silence_s, on_end
        self._gone: set[str] = set()
        self._at: dict[str, set[int]] = {}
        self._left: set[int] = set()
        self._change = threading.Condition()
        self._closing = self._failed = self._known = False
        self._thread = threading.Thread(target=self._run, name="mmx-watch", daemon=True)
        self._thread.start()

    def barrier(self, name: str) -> None:
        """Returns when all processes have called it with the same name, however late."""
        if self.index:
            self.peers[0].send({"at": name})
        else:
            self._arrive(name, 0)
        with self._change:
            self._change.wait_for(lambda: name in self._gone)
            self._gone.discard(name)

    def fail(self, sentence: str) -> None:
        """Tells all others that this process ends and why; returns when they know."""
        self._failed = True
        said = f"{self._name(self.index)} failed: {sentence} The job ends."
        if self.index:
            self.peers[0].send({"fail": said})
            until = time.monotonic() + LINGER_SECONDS
            while not (self._known or self.peers[0].closed) and time.monotonic() < until:
                time.sleep(0.05)
        else:
            self._tell(said)

    def close(self) -> None:
        """Stops watching once all processes have come here."""
        if not self._closing:
            self.barrier(_LAST)
        self._thread.join(LINGER_SECONDS)
        for peer in self.peers.values():
            peer.sock.close()

    def process_0_gone(self) -> bool:
        """Whether process 0 is gone, told at once: it serves a dying process."""
        return bool(self.index) and not self._closing and self.peers[0].hung_up()

    def lost(self, process: int, how: str = "ended without a word") -> str:
        return (f"{self._name(process)} {how}. The job ends; the same command resumes it.")

    def _name(self, process: int) -> str:
        return f"process {process} on {self.hosts[process]}"

    def _run(self) -> None:
        beat = now = time.monotonic()
        between = min(_BEAT_SECONDS, self._silence / 8)
        while not self._closing:
            for peer in readable(self.peers.values(), beat - time.monotonic()):
                self._read(peer)
            before, now = now, time.monotonic()
            if now - before > self._silence / 2:
                # It is this process that was stopped: what came meanwhile is read first.
                for peer in self.peers.values():
                    peer.heard = now
            if now >= beat:
                beat = now + between
                for process, peer in self.peers.items():
                    if process not in self._left:
                        peer.send({})
                        if now - peer.heard > self._silence:
                            self._over(self.lost(
                                process, f"has not answered for {self._silence:g} s"), process)

    def _read(self, peer: Peer) -> None:
        process = next(i for i, one in self.peers.items() if one is peer)
        try:
            messages = peer.read()
        except ValueError:
            messages, peer.closed = [], True
        for message in messages:
            if "at" in message:
                self._arrive(message["at"], process)
            elif "go" in message:
                self._release(message["go"])
            elif "fail" in message:
                self._over(message["fail"], process)
            elif "end" in message:
                self._over(message["end"], process)
        if peer.closed and process not in self._left and not self._closing:
            self._left.add(process)
            self._over(self.lost(process), process)

    def _arrive(self, name: str, process: int) -> None:
        with self._change:
            there = self._at.setdefault(name, set())
            there.add(process)
            if len(there) < len(self.hosts):
                return
            del self._at[name]
        self._closing |= name == _LAST
        for peer in self.peers.values():
            peer.send({"go": name})
        self._release(name)

    def _release(self, name: str) -> None:
        self._closing |= name == _LAST  # from here on a closed connection is no loss
        with self._change:
            self._gone.add(name)
            self._change.notify_all()

    def _over(self, sentence: str, process: int) -> None:
        if self._failed:  # this process has its own reason to end, and tells it
            self._known = True
            return
        self._failed = True
        if not self.index:
            self._tell(sentence, besides=process)
        self._on_end(sentence)

    def _tell(self, sentence: str, besides: int = -1) -> None:
        """Process 0: tells the others, and waits until they are gone: its end would abort them.

        `besides`, the process at fault, is told last: then it knows that all are.
        """
        rest = [peer for process, peer in self.peers.items() if process != besides]
        for peers in (rest, [self.peers[besides]] if besides in self.peers else []):
            peers = [peer for peer in peers if not peer.closed]
            for peer in peers:
                peer.send({"end": sentence})
            until = time.monotonic() + LINGER_SECONDS
            while time.monotonic() < until and not all(peer.closed for peer in peers):
                for peer in readable(peers, 0.1):
                    try:
                        peer.read()
                    except ValueError:
                        peer.closed = True
