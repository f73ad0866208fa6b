"""How processes find each other, and what they say when one is wrong, missing or lost."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mmx.errors import UserError
from mmx.sharding import distributed, link, watch

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("MMX_", "SLURM_", "TPU_", "MEGASCALE_", "OMPI_", "JOB_COMPLETION")):
            monkeypatch.delenv(name)
    return monkeypatch


def together(*calls):
    """Runs the calls at once; returns what each returned or raised."""
    results = [None] * len(calls)

    def one(i):
        try:
            results[i] = calls[i]()
        except UserError as error:
            results[i] = error

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return results


def gather(port, n, timeout=10.0):
    return lambda: link.gather(port, n, "head", timeout)


def join(port, i, n, host=None, timeout=10.0):
    return lambda: link.join(("127.0.0.1", port), i, n, host or f"host{i}", timeout)


def test_a_single_machine_pays_nothing():
    code = ("import sys; from mmx.sharding import distributed as d; pod = d.start();"
            "print(pod.count, pod.is_main, 'jax' in sys.modules)")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MMX_", "SLURM_"))}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env=clean)
    assert done.stdout.split() == ["1", "True", "False"], done.stderr


@pytest.mark.parametrize("values, words", [
    (dict(MMX_COORDINATOR="a:1"), "MMX_COORDINATOR is set and MMX_PROCESSES, MMX_PROCESS_ID not"),
    (dict(MMX_COORDINATOR="a:1", MMX_PROCESSES="2", MMX_PROCESS_ID="2"),
     "MMX_PROCESS_ID=2 of MMX_PROCESSES=2 is out of range. Ids count from 0 to 1"),
    (dict(MMX_COORDINATOR="a:1", MMX_PROCESSES="0", MMX_PROCESS_ID="0"), "MMX_PROCESSES=0"),
    (dict(MMX_COORDINATOR="a:1", MMX_PROCESSES="two", MMX_PROCESS_ID="0"), "MMX_PROCESSES=two"),
    (dict(MMX_COORDINATOR="a:1", MMX_PROCESSES="2", MMX_PROCESS_ID="-1"), "MMX_PROCESS_ID=-1"),
    (dict(MMX_COORDINATOR="a", MMX_PROCESSES="2", MMX_PROCESS_ID="0"), "'a' is no address"),
    (dict(MMX_COORDINATOR="a:99999", MMX_PROCESSES="2", MMX_PROCESS_ID="0"), "is no address"),
    (dict(MMX_TIMEOUT_S="soon"), "MMX_TIMEOUT_S=soon is out of range"),
    (dict(MMX_SILENCE_S="0"), "MMX_SILENCE_S=0 is out of range"),
])
def test_wrong_variables_are_told(alone, values, words):
    for name, value in values.items():
        alone.setenv(name, value)
    with pytest.raises(UserError) as caught:
        distributed.start()
    assert words in str(caught.value)


def test_modes(alone):
    with pytest.raises(UserError, match="finds no other process"):
        distributed.start("on")
    with pytest.raises(UserError, match="'maybe' is not a choice"):
        distributed.start("maybe")
    alone.setenv("MMX_PROCESSES", "broken")
    assert distributed.start("off").count == 1
    for name, value in dict(MMX_COORDINATOR="a:1", MMX_PROCESSES="1", MMX_PROCESS_ID="0").items():
        alone.setenv(name, value)
    pod = distributed.start("on")
    assert (pod.index, pod.count, pod.is_main) == (0, 1, True)
    pod.barrier("nothing to wait for")
    pod.finish()


def test_slurm_is_found_and_a_lone_step_is_not(alone):
    slurm = dict(SLURM_JOB_ID="4097", SLURM_STEP_NODELIST="node[07-09]", SLURM_NTASKS="3",
                 SLURM_PROCID="2", SLURM_LOCALID="0")
    for name, value in slurm.items():
        alone.setenv(name, value)
    assert distributed._from_cluster(5.0) == distributed.Place("node07:61441", 3, 2, (0,))
    alone.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert distributed._from_cluster(5.0) is None


@pytest.mark.parametrize("env, cluster", [
    ({}, False), ({"TPU_WORKER_HOSTNAMES": "a"}, False), ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True),
    ({"JOB_COMPLETION_INDEX": "1"}, True), ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
    ({"SLURM_NTASKS": "4"}, False)])
def test_hints_at_a_cluster(alone, env, cluster):
    for name, value in env.items():
        alone.setenv(name, value)
    assert distributed._hints_at_cluster() == cluster


@pytest.mark.parametrize("env, count", [
    ({}, 1), ({"SLURM_STEP_NUM_TASKS": "4"}, 4), ({"OMPI_COMM_WORLD_SIZE": "2"}, 2),
    ({"SLURM_NTASKS": "4"}, 1), ({"TPU_WORKER_HOSTNAMES": "a,b"}, 1),
    (dict(MMX_COORDINATOR="a:1", MMX_PROCESSES="3", MMX_PROCESS_ID="0"), 3)])
def test_what_a_launcher_started_is_told_apart_from_a_place_in_a_slice(alone, env, count):
    for name, value in env.items():
        alone.setenv(name, value)
    assert distributed.started_processes() == count


def test_processes_find_each_other_past_a_stranger(port):
    def stranger():
        for _ in range(100):
            try:
                with socket.create_connection(("127.0.0.1", port), 1) as sock:
                    sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
                    return
            except OSError:
                time.sleep(0.02)

    results = together(join(port, 2, 3), stranger, gather(port, 3), join(port, 1, 3))
    assert results[2][1] == results[0][1] == results[3][1] == ["head", "host1", "host2"]
    assert sorted(results[2][0]) == [1, 2]


def test_missing_processes_are_named_to_all(port):
    head, other = together(gather(port, 4, 1.5), join(port, 2, 4, timeout=1.5))
    words = "Processes 1, 3 of 4 did not come within 1.5 s; there are 0 on head, 2 on host2."
    assert words in str(head) and words in str(other)


@pytest.mark.parametrize("others, words", [
    ([(1, 3, "a"), (1, 3, "b")], "Two processes have the id 1"),
    ([(1, 5, "a")], "Process 1 on a counts 5 processes and process 0 on head counts 3"),
])
def test_ids_and_counts_that_clash(port, others, words):
    results = together(gather(port, 3, 2.0),
                       *(join(port, i, n, host, 2.0) for i, n, host in others))
    assert words in str(results[0])


def test_an_absent_coordinator_is_named(port):
    with pytest.raises(UserError) as caught:
        join(port, 3, 4, timeout=0.5)()
    assert re.search(rf"Process 3 on host3 cannot reach process 0 at 127.0.0.1:{port} within "
                     r"0.5 s \(connection refused\)", str(caught.value))


def test_a_port_in_use_is_told(port):
    with socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True):
        with pytest.raises(UserError, match=f"Port {port} cannot be opened"):
            gather(port, 2, 0.5)()


@pytest.fixture
def trio(port, monkeypatch):
    """Three watches, one per process, and what each was told to end with."""
    monkeypatch.setattr(watch, "LINGER_SECONDS", 0.5)  # nobody here ends for real
    ends = {}
    (peers, hosts), *others = together(gather(port, 3), join(port, 1, 3), join(port, 2, 3))
    watches = []
    for i, links in enumerate([peers, *({0: peer} for peer, _ in others)]):
        def told(sentence, i=i):
            ends[i] = sentence
            watches[i]._closing = True  # what the real one does by ending its process
            for peer in watches[i].peers.values():
                peer.sock.close()

        watches.append(watch.Watch(i, hosts, links, 1.5, told))
    yield watches, ends
    for one in watches:
        one._closing = True
        one.close()


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


def test_a_barrier_waits_for_the_last(trio):
    watches, ends = trio
    passed = []

    def arrive(i):
        watches[i].barrier("x")
        passed.append(i)

    threads = [threading.Thread(target=arrive, args=(i,)) for i in (0, 2)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    assert not passed
    together(lambda: arrive(1))
    for thread in threads:
        thread.join(5)
    assert sorted(passed) == [0, 1, 2]
    together(*(lambda i=i: watches[i].barrier("x") for i in range(3)))  # a name serves again
    assert not ends


def test_all_leave_together_and_nobody_is_lost(trio):
    watches, ends = trio
    late = threading.Timer(0.5, watches[1].close)
    late.start()
    began = time.monotonic()
    together(watches[0].close, watches[2].close)
    late.join(5)
    assert time.monotonic() - began > 0.4 and not ends


@pytest.mark.parametrize("victim", [0, 2])
def test_a_process_that_dies_is_named_to_all(trio, victim):
    watches, ends = trio
    watches[victim]._closing = True
    watches[victim]._thread.join(5)
    for peer in watches[victim].peers.values():
        peer.sock.close()
    rest = {0, 1, 2} - {victim}
    until(lambda: set(ends) >= rest)
    host = "head" if victim == 0 else f"host{victim}"
    assert all(f"process {victim} on {host} ended without a word" in ends[i] for i in rest)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_hangs_is_named_to_all(trio, victim):
    watches, ends = trio
    watches[victim]._closing = True  # neither beats nor reads, and its connections stay open
    watches[victim]._thread.join(5)
    rest = {0, 1, 2} - {victim}
    until(lambda: set(ends) >= rest)
    assert all(f"process {victim} on" in ends[i] and "not answered for 1.5 s" in ends[i]
               for i in rest)


@pytest.mark.parametrize("victim", [0, 1])
def test_an_error_of_one_ends_all_with_its_sentence(trio, victim):
    watches, ends = trio
    watches[victim].fail("The file is gone.")
    rest = {0, 1, 2} - {victim}
    until(lambda: set(ends) >= rest)
    assert all(f"process {victim} on" in ends[i] and "failed: The file is gone." in ends[i]
               for i in rest)
    assert victim not in ends
