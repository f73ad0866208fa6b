"""A plan as text for people."""

import dataclasses
from collections.abc import Mapping, Sequence

from mmx.plan import meshes
from mmx.plan.fit import GIB, GPU_NOTE, Fit

_PARTS = (("weights", "weights"), ("keys_values", "keys and values"),
          ("states", "lightning states"), ("optimizer", "optimiser moments"),
          ("other", "tokens, sampling, the rest"), ("temporaries", "temporaries and code"))
_WHAT = {"decode": "decode step", "prefill": "prefill chunk", "long": "chunk of a long prompt",
         "train": "training step"}


def text(name: str, fit: Fit, largest: Mapping[str, int | None], others: Sequence[Fit]) -> str:
    """Returns the report of the best mesh, and a line for each of the others."""
    job, pod = fit.job, fit.pod
    width = f"{job.quantize} weights" if job.quantize else job.dtype
    lines = [f"{name} on {pod.name} ({pod.devices} devices, {fit.mesh_text}), {width}: "
             f"{_WHAT[job.mode]}, batch {job.batch:,}, context {job.context:,}"
             + (f", chunk {job.chunk:,}" if job.mode in ("prefill", "long") else "")]
    spare = (fit.limit - fit.memory.total) / GIB
    lines.append(f"  {'FITS' if fit.fits else 'DOES NOT FIT'}: {fit.memory.total / GIB:.2f} of "
                 f"{fit.limit / GIB:.2f} GiB per device, "
                 + (f"{spare:.2f} to spare" if fit.fits else f"{-spare:.2f} too much")
                 + (f"  (compiled in {fit.compile_s:.0f} s, not run)" if fit.compiled
                    else f"  ({fit.note})"))
    lines += ["", "  GiB per device"]
    for field, label in _PARTS:
        size = getattr(fit.memory, field)
        if size:
            lines.append(f"    {label:<28}{size / GIB:>8.2f}")
    for what, value in largest.items():
        lines.append(f"  largest {what} that fits: "
                     + (f"{value:,}" if value else "none; not even the smallest"))
    if fit.kernels:
        lines += ["", "  kernels in a step: " + ", ".join(
            f"{name} {count:,} times" for name, count in fit.kernels.items())]
    lines += _traffic(fit)
    if fit.estimate is not None:
        one = fit.estimate
        lines += ["", f"  step at least {_time(one.step_s)} if all overlaps, "
                  f"{_time(one.serial_s)} if nothing does: bound by {one.bound}",
                  f"    compute {_time(one.compute_s)}, memory {_time(one.memory_s)}, network "
                  f"{_time(one.network_s)}; {job.tokens / one.step_s:,.0f} tokens/s at most",
                  f"    ({one.label})"]
        if pod.chip.platform == "cuda":
            lines.append(f"    ({GPU_NOTE})")
        # The terms that matter; --json has all.
        lines += [f"    {formula}" for formula in one.formulas
                  if formula.startswith(("compute", "memory"))]
    for other in others:
        step = f"step ≥ {_time(other.estimate.step_s)}" if other.estimate else "refused"
        lines.append(f"  also {other.mesh_text}: {other.memory.total / GIB:.2f} GiB, {step}, "
                     f"{'fits' if other.fits else 'does not fit'}")
    if not fit.fits:
        if others:
            lines += ["", f"  None of the {1 + len(others)} likeliest meshes fits; the first here "
                      "needs least."]
        lines += _even(fit)
        lines += ["", f"  {_less(fit)}"]
    return "\n".join(lines)


def _less(fit: Fit) -> str:
    """What would need less, of what is not done already and would be enough."""
    job = fit.job
    ways = ["More or larger devices"]
    if job.mode != "train" and not job.quantize:
        ways.append("--quantize=int8")
    share = meshes.share(job, fit.axes)
    if (share.held if job.mode == "train" else share.weights) < fit.limit:
        ways.append("a smaller --batch or --context")
    return (", ".join(ways[:-1]) + " or " if ways[1:] else "") + f"{ways[-1]} would need less."


def _even(fit: Fit) -> list[str]:
    """A line where the next batch that lies evenly over the mesh would fit, as far as is known."""
    job, step = fit.job, meshes.batch_step(fit.job, fit.axes)
    even = dataclasses.replace(job, batch=-(-job.batch // step) * step)
    less = meshes.share(job, fit.axes).held - meshes.share(even, fit.axes).held
    enough = less > 0 and fit.memory.total - less <= fit.limit
    return [f"  A batch of {job.batch:,} does not lie evenly over this mesh; --batch={even.batch} "
            f"takes {less / GIB:.2f} GiB less."] if enough else []


def _traffic(fit: Fit) -> list[str]:
    if not fit.collectives:
        return []
    rows: dict[tuple, list[float]] = {}
    for one in fit.collectives:
        entry = rows.setdefault((one.axes, one.kind), [0, 0.0])
        entry[0] += one.count
        entry[1] += one.sent * one.count
    lines = ["", "  sent by each device in a step", f"    {'over':<22}{'kind':<22}{'times':>8}"
             f"{'MiB':>12}"]
    ordered = sorted(rows.items(), key=lambda item: -item[1][1])
    for (axes, kind), (count, sent) in ordered:
        lines.append(f"    {'+'.join(axes):<22}{kind:<22}{count:>8,.0f}{sent / 2**20:>12,.2f}")
    return lines


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"
