"""Whether a job fits a pod: compiles it, and reckons memory, traffic and time."""

import contextlib
import dataclasses
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmx.errors import UserError
from mmx.plan import hlo, meshes, roofline, topology
from mmx.plan.pods import Pod
from mmx.plan.programs import Job, Memory, compile_step

GIB = 2**30
# cuDNN builds its programs on a GPU alone.
GPU_NOTE = ("softmax attention compiled as blocks in XLA, where a GPU takes cuDNN's: its bytes, "
            "and the time of a long context, are too high")
TRIES = 5  # meshes compiled before the answer is no
_NEED = re.compile(r"\(([\d.]+)([MGT])\) exceeds available|"
                   r"[Uu]sed ([\d.]+)([MGT]) of ([\d.]+)([MGT]) hbm")
_UNIT = {"M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Fit:
    """One job compiled for one mesh of a pod; compiled, not run.

    memory: of one device. limit: bytes that a device has. collectives: exchanges of one step.
    estimate: None where the compiler refused the program. compile_s: seconds it took. kernels:
    names of hand-written kernels in the program and how often a step runs them; versions: of jax
    and of the compiler's package. compiled: False where weights and caches alone exceed the limit.
    """

    job: Job
    pod: Pod
    axes: Mapping[str, int]
    memory: Memory
    limit: int
    collectives: tuple[hlo.Collective, ...]
    estimate: roofline.Estimate | None
    compile_s: float
    kernels: Mapping[str, int] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    compiled: bool = True

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.limit

    @property
    def note(self) -> str:
        if not self.compiled:
            return "not compiled: what is held between steps is already too much"
        return "compiled, not run" + (f"; {GPU_NOTE}" if self.pod.chip.platform == "cuda" else "")

    @property
    def mesh_text(self) -> str:
        return ",".join(f"{name}={size}" for name, size in self.axes.items())

    def to_json(self) -> dict[str, Any]:
        config = self.job.config
        found = {
            "pod": self.pod.name, "devices": self.pod.devices, "mesh": dict(self.axes),
            "mode": self.job.mode, "batch": self.job.batch, "context": self.job.context,
            "chunk": self.job.chunk if self.job.mode in ("prefill", "long") else None,
            "dtype": self.job.dtype, "quantize": self.job.quantize,
            "kv_dtype": self.job.kv_dtype, "layers": config.num_layers,
            "fits": self.fits, "limit_bytes": self.limit,
            "bytes_per_device": dataclasses.asdict(self.memory),
            "kernels": dict(self.kernels), "compiled": self.compiled,
            "compile_s": round(self.compile_s, 1),
            "versions": dict(self.versions), "note": self.note}
        found["collectives"] = [
            {"kind": one.kind, "axes": list(one.axes), "count": one.count,
             "bytes": one.bytes, "sent_bytes": one.sent * one.count} for one in self.collectives]
        if self.estimate is not None:
            estimate = self.estimate
            found["estimate"] = {
                "label": estimate.label, "bound": estimate.bound, "step_s": estimate.step_s,
                "compute_s": estimate.compute_s, "memory_s": estimate.memory_s,
                "network_s": estimate.network_s, "formulas": list(estimate.formulas),
                "tokens_per_s": self.job.tokens / estimate.step_s}
        return found


def compile_fit(job: Job, pod: Pod, axes: Mapping[str, int]) -> Fit:
    """Compiles the job's step for the pod; a refusal for lack of memory is an answer, too.

    Nothing is compiled where what is held between steps exceeds a device: the compiler may take
    all memory of this machine to say so. Raises UserError where this machine's memory runs out.
    """
    mesh = topology.make_mesh(pod, dict(axes))
    begin, limit = time.perf_counter(), int(pod.chip.hbm_gib * GIB)
    versions, held = topology.versions(pod), meshes.share(job, axes)
    if held.held > limit:
        return Fit(job, pod, axes, _refused(job, held, held.held), limit, (), None, 0.0,
                   versions=versions, compiled=False)
    try:
        compiled, memory = compile_step(job, mesh)
    except UserError:
        raise
    except Exception as error:
        total = _needed(str(error))
        if total is None and (isinstance(error, MemoryError) or "Out of memory" in str(error)):
            raise UserError("The memory of this machine ran out while it compiled.",
                            "It is the compiler's need that counts here, not the pod's.",
                            "Use a machine with more memory, or a smaller --batch.") from error
        if total is None:
            raise
        memory = _refused(job, held, max(total, limit + 1))
        return Fit(job, pod, axes, memory, limit, (), None, time.perf_counter() - begin,
                   versions=versions)
    spent, text = time.perf_counter() - begin, compiled.as_text()
    exchanged = tuple(hlo.collectives(text, mesh))
    estimate = roofline.estimate(
        hlo.dots_by_type(text), hlo.bytes_accessed(text), exchanged, pod.chip, mesh)
    return Fit(job, pod, axes, memory, limit, exchanged, estimate, spent, hlo.kernels(text),
               versions)


def _refused(job: Job, held: meshes.Candidate, total: int) -> Memory:
    train = job.mode == "train"
    return Memory(weights=held.weights, keys_values=held.keys_values,
                  states=0 if train else held.states, optimizer=held.states if train else 0,
                  other=0, temporaries=max(total - held.held, 0), total=total)


def try_meshes(job: Job, pod: Pod, chosen: Sequence[meshes.Candidate], count: int = 1,
               waiting: Callable = contextlib.nullcontext) -> list[Fit]:
    """Compiles the first `count` of the meshes `chosen`, and up to TRIES in all until one fits.

    Returns them, the fastest that fits first; where none does, the one that needs least.
    `waiting(text)` gives a context for each compilation.
    """
    found: list[Fit] = []
    for number, one in enumerate(chosen[:max(count, TRIES)], 1):
        if number > count and any(fit.fits for fit in found):
            break
        ordinal = f" (mesh {number})" if number > 1 else ""
        quick = one.held > pod.chip.hbm_gib * GIB  # refused without compiling
        with contextlib.nullcontext() if quick else waiting(
                f"compiling for {pod.name} on {one.text}{ordinal} …"):
            found.append(compile_fit(job, pod, one.axes))
    return sorted(found, key=lambda fit: (
        not fit.fits, fit.estimate.step_s if fit.fits and fit.estimate else fit.memory.total))


def _needed(message: str) -> int | None:
    """Bytes that the compiler says it would have needed; None if it refused for another reason."""
    if "RESOURCE_EXHAUSTED" not in message and "hbm" not in message.lower():
        return None
    match = _NEED.search(message)
    if not match:
        return None
    number, unit = (match[1], match[2]) if match[1] else (match[3], match[4])
    return int(float(number) * _UNIT[unit])


def largest(fit: Fit, what: str, waiting: Callable = contextlib.nullcontext) -> int | None:
    """Returns the largest "batch" or "context" that still fits; None if not even the smallest.

    The memory of the compiled job says where to look, and a compilation confirms it; each refusal
    lowers the guess by a twentieth. `waiting(text)` gives a context for each compilation.
    """
    job, memory = fit.job, fit.memory
    unit = meshes.batch_step(job, fit.axes) if what == "batch" else 1024
    now = getattr(job, what)
    growing = memory.keys_values + memory.other
    if what == "batch":  # what a cache can hold makes neither states nor a step's temporaries grow
        growing += memory.states + memory.temporaries
    room = fit.limit - (memory.total - growing)
    if room <= 0 or growing <= 0:
        return None
    guess = int(now * room / growing)
    if what == "context":
        guess = min(guess, 1 << 30)
    while guess >= unit:
        guess = guess // unit * unit
        with waiting(f"compiling {what}={guess:,} on {fit.mesh_text} …"):
            tried = compile_fit(dataclasses.replace(job, **{what: guess}), fit.pod, fit.axes)
        if tried.fits:
            return guess
        guess = min(guess - unit, int(guess * 0.95))
    return None
