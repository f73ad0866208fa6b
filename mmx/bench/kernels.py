"""`mmx bench kernels`: every implementation of every operation, in turns, beside its floor."""

import gc
import importlib
from collections.abc import Callable, Sequence
from functools import partial

from mmx.bench import records
from mmx.bench.cases import UNPACKED, Case
from mmx.bench.floors import Ceilings
from mmx.bench.timing import Method, Run, Timing, first_sentence, in_turns
from mmx.errors import UserError, nearest
from pallas_kernels import dispatch

AUTO = "auto"
REFERENCE = "reference"
# Operations that are compared with float64, and the modules that have their forms.
OPS = ("lightning_attention", "grouped_matmul", "attention")
_MODULES = {op: f"pallas_kernels.{op}.api" for op in OPS} | {
    "lightning_decode_slots": "pallas_kernels.lightning_attention.decode"}
# Parts of names by the platform where they are at home; elsewhere they are refused or interpreted.
_HOME = {"tpu": ("tpu", "splash", "megablox"), "gpu": ("gpu", "hopper", "cudnn", "triton", "cuda")}


def listed(op: str) -> list[str]:
    """Names that `op` has in `pallas_kernels`, on whatever platform."""
    return list(importlib.import_module(_MODULES[op])._IMPLEMENTATIONS)


def at_home(name: str, platform: str) -> bool:
    """Whether an implementation is made for `platform`, or for all."""
    homes = {home for home, parts in _HOME.items() if any(part in name for part in parts)}
    return not homes or platform in homes


def chosen(op: str, named: Sequence[str], also: Sequence[str] = ()) -> list[str]:
    """Implementations of `op` to time: those named, or "auto" and all at home here but the
    reference, which takes one token at a time, and forms for single cases that are not `also`."""
    names = [*listed(op), AUTO]
    if named:
        return [name for name in named if name in names]
    platform = dispatch.platform()
    by_name = getattr(importlib.import_module(_MODULES[op]), "BY_NAME", ())
    own = [name for name in listed(op) if name != REFERENCE and at_home(name, platform)
           and (name not in by_name or name in also)]
    return [AUTO, *own]


def check_names(named: Sequence[str]) -> None:
    """Raises UserError for an implementation that no operation has."""
    known = sorted({AUTO, *(name for op in _MODULES for name in listed(op))})
    for name in named:
        if name not in known:
            raise UserError(f"There is no implementation '{name}'.",
                            f"The operations have {', '.join(known)}.", nearest(name, known))


def select(cases: Sequence[Case], what: Sequence[str], shapes: Sequence[str]) -> list[Case]:
    """Cases of these operations and shapes; all but the context curves where none is named.

    Raises UserError for a name that none has.
    """
    operations = list(dict.fromkeys(case.operation for case in cases))
    for name in what:
        if name not in operations:
            raise UserError(f"There is no operation '{name}' to time.",
                            f"--what takes {', '.join(operations)}.", nearest(name, operations))
    kept = [case for case in cases
            if (case.operation in what if what else not case.operation.startswith("context"))]
    known = list(dict.fromkeys(case.shape for case in kept))
    for name in shapes:
        if name not in known:
            raise UserError(f"There is no shape '{name}' here.",
                            f"--shapes takes {', '.join(known)}.", nearest(name, known))
    return [case for case in kept if not shapes or case.shape in shapes]


def compared(cases: Sequence[Case]) -> list[str]:
    """The operations of `OPS` that these cases time, or whose states they address by slots."""
    ops = {"lightning_attention" if case.op == "lightning_decode_slots" else case.op
           for case in cases}
    return [op for op in OPS if op in ops]


def measure(case: Case, named: Sequence[str], method: Method, ceilings: Ceilings, seed: int,
            peers: Callable[[Case], dict[str, Callable[[], Run]]] = lambda case: {}) -> list[dict]:
    """Times one case; a row for each implementation and peer."""
    names = chosen(case.op, named, case.also)
    if case.own_choice:
        names = [name for name in names if name == AUTO]
    if not names:
        return []
    if case.also_unpacked:
        names = [name + end for name in names for end in ("", UNPACKED)]
    try:
        make = case.prepare(seed)
    except Exception as error:  # inputs beyond the device's memory
        return [_row(case, name, first_sentence(error), ceilings) for name in names]

    ours = {name: partial(make, None if name == AUTO else name) for name in names}
    found = in_turns({**ours, **peers(case)}, method)
    # Inputs are gone before those of the next case come.
    del make, ours
    gc.collect()
    return [_row(case, name, timing, ceilings) for name, timing in found.items()]


def _row(case: Case, name: str, timing: Timing | str, ceilings: Ceilings) -> dict:
    return records.of_work(case.operation, case.shape, case.dims, case.dtype, name, timing,
                           case.work, ceilings)

