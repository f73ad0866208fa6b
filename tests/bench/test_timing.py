"""The timer by a clock of its own: rounds, turns, inner loops, failures."""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx.bench.timing import Method, Run, Timing, dispatched, first_sentence, in_turns, looped


class Machine:
    """A clock that only the work moves: `cost` seconds each time, noted by name."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def run(self, name, cost, steps=1):
        def call(count):
            self.log.append((name, count))
            self.now += cost() * count if callable(cost) else cost * count
        return lambda: Run(call, steps)


def test_inner_loop_is_long_enough_and_times_are_per_step():
    machine = Machine()
    found = in_turns({"a": machine.run("a", 0.003, steps=4)}, Method(3, 0.05), lambda: machine.now)
    timing = found["a"]
    assert len(timing.seconds) == 3 and timing.median == pytest.approx(0.003 / 4)
    repeats = timing.inner // 4
    assert repeats * 0.003 >= 0.05
    assert machine.log[-3:] == [("a", repeats)] * 3


def test_implementations_take_turns_and_the_first_changes():
    machine = Machine()
    runs = {name: machine.run(name, 1.0) for name in "abc"}
    in_turns(runs, Method(3, 0.5), lambda: machine.now)
    rounds = [name for name, _ in machine.log[-9:]]
    assert rounds == list("abc") + list("bca") + list("cab")


def test_a_failure_is_its_sentence_and_the_others_go_on():
    machine, left = Machine(), [3]

    def dies_later():
        left[0] -= 1
        if left[0] < 0:
            raise MemoryError("Out of memory. Details follow.\nmore")
        return 1.0

    def broken():
        raise ValueError("No such tile: 7 does not divide 64. Pass 8.")

    found = in_turns({"a": machine.run("a", 1.0), "b": broken,
                      "c": machine.run("c", dies_later)}, Method(4, 0.5), lambda: machine.now)
    assert len(found["a"].seconds) == 4
    assert found["b"] == "No such tile: 7 does not divide 64."
    assert found["c"] == "Out of memory."


def test_a_very_slow_one_gets_fewer_rounds():
    machine = Machine()
    found = in_turns({"slow": machine.run("slow", 50.0), "quick": machine.run("quick", 1.0)},
                     Method(5, 0.5), lambda: machine.now)
    assert len(found["slow"].seconds) == 2 and len(found["quick"].seconds) == 5


def test_median_and_spread():
    timing = Timing((1.0, 4.0, 2.0, 3.0), 1)
    assert timing.median == statistics.median([1, 2, 3, 4]) == 2.5
    assert timing.spread == pytest.approx(3 / 2.5)


@pytest.mark.parametrize("text, sentence", [
    ("Ran out: 1.5 GiB asked. Free some.", "Ran out: 1.5 GiB asked."),
    ("one line\nand another", "one line"), ("", "RuntimeError"), ("x" * 300, "x" * 199 + "…")])
def test_first_sentence(text, sentence):
    assert first_sentence(RuntimeError(text)) == sentence


def test_a_loop_carries_its_state_and_keeps_what_it_gives():
    run = looped(lambda x, w: (x * w, x + 1), jnp.float32(1), 5, jnp.float32(2))
    run.call(2)
    run.call(1)
    held = run.call.__closure__
    (carry, out), = [cell.cell_contents[0] for cell in held if isinstance(cell.cell_contents, list)]
    assert run.steps == 5 and float(carry) == 2.0**15 and float(out) == 2.0**14 + 1


def test_a_dispatched_program_is_called_that_often():
    calls = []

    def note(x):
        calls.append(float(x))
        return np.float32(x)

    program = jax.jit(lambda x: jax.pure_callback(note, jax.ShapeDtypeStruct((), jnp.float32), x))
    dispatched(program, jnp.float32(3)).call(4)
    assert calls == [3.0] * 4
