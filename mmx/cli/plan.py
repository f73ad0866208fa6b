"""Tell whether a job fits a pod, how, and at what traffic, without the pod: the real step is
compiled for it, in half a minute to a few minutes, and not run. Exit code: 0 it fits, 3 it does
not, 2 a mistake in the command.
"""

import dataclasses
import json
import sys

from mmx.cli.interrupt import interruptible
from mmx.cli.settings import setting
from mmx.errors import UserError

EXAMPLE = """
mmx plan --model=text01 --pod=v6e:4x8 --mode=decode --batch=32 --context=8192
mmx plan --model=text01 --pod=h200:1x8 --quantize=int8 --search
mmx plan --model=text01 --pod=v5p-32 --mode=long --context=1048576 --json
"""
DOES_NOT_FIT = 3
_MOST = 2**31 - 1  # positions and rows are 32-bit integers


@dataclasses.dataclass(frozen=True)
class PlanSettings:
    model: str = setting("text01", "A preset, or a directory with config.json.", group="Input")
    pod: str = setting("v6e:4x8", "CHIP:TOPOLOGY, or a cloud's name. Chips are v4, v5e, v5p, "
                       "v6e, tpu7x, h200; for example v5p:2x2x4, h200:1x8 (hosts x GPUs), v6e-32, "
                       "2*v6e:16x16 (two slices).", group="Input")
    mode: str = setting("decode", "decode: a token for each sequence. prefill: a chunk of each "
                        "prompt. long: a chunk of few long prompts. train: one step.",
                        choices=("decode", "prefill", "long", "train"))
    batch: int | None = setting(None, "Sequences at once; 32 (1 for long, 64 to train) if not "
                                "given.", low=1, high=_MOST)
    context: int = setting(8192, "Tokens that each sequence can hold.", low=1, high=_MOST)
    chunk: int | None = setting(None, "Tokens of each prompt that one step consumes (prefill, "
                                "long); 2048 if not given.", low=1, high=_MOST)
    quantize: str | None = setting(None, "Hold the large matrices in 8 bits.", choices=("int8",))
    dtype: str = setting("bfloat16", "Number format of weights and activations.",
                         choices=("bfloat16", "float32"))
    kv_dtype: str = setting("bfloat16", "Number format of cached keys and values.",
                            choices=("bfloat16", "float32", "float8_e4m3fn"))
    moe_capacity: float = setting(0.0, "An expert takes at most this multiple of its equal share "
                                  "of a training batch's tokens (train); 0: all.", low=0)
    mesh: str | None = setting(None, "Lay the devices out so, for example expert=4,tensor=8; axes "
                               "are slice, data, sequence, expert, tensor. The likeliest that "
                               "fits if not given.",
                               value="AXIS=SIZE,…")
    meshes: int = setting(1, "Compile this many of the likeliest meshes and rank them.", low=1,
                          high=32)
    search: bool = setting(False, "Find the largest batch and context that fit: two or more "
                           "compilations more.")
    json: bool = setting(False, "Write one JSON object.", group="Output")


Settings = PlanSettings


def run(call) -> int:
    """Compiles and reports; 3 when the job does not fit."""
    settings = call.settings
    _refuse_unused(settings)
    from mmx.plan import topology

    topology.prepare_environment()
    from mmx.checkpoint import load_config
    from mmx.config import preset, preset_names
    from mmx.obs.progress import Waiting
    from mmx.plan import fit, meshes, report
    from mmx.plan.pods import parse_pod
    from mmx.plan.programs import Job
    from mmx.sharding.mesh import parse_axes

    name = settings.model
    config = preset(name) if name in preset_names() else load_config(name)
    pod = parse_pod(settings.pod)
    batch = settings.batch or {"long": 1, "train": 64}.get(settings.mode, 32)
    job = Job(config, settings.mode, batch, settings.context, settings.chunk or Job.chunk,
              settings.dtype, settings.quantize, settings.kv_dtype, settings.moe_capacity)
    if settings.mesh:
        chosen = [meshes.share(job, topology.check_axes(pod, parse_axes(settings.mesh)))]
    else:
        chosen = meshes.candidates(job, pod)

    with interruptible(lambda: "Interrupted while compiling, so there is no answer."):
        (best, *others), found = fit.try_meshes(job, pod, chosen, settings.meshes, Waiting), {}
        if settings.search and best.fits:
            found = {what: fit.largest(best, what, Waiting) for what in ("batch", "context")}
    if settings.json:
        answer = {"model": name, **best.to_json(), "largest": found or None,
                  "others": [one.to_json() for one in others]}
        print(json.dumps(answer))
    else:
        print(report.text(name, best, found, others))
    sys.stdout.flush()
    return 0 if best.fits else DOES_NOT_FIT


def _refuse_unused(settings: PlanSettings) -> None:
    for name, modes in (("chunk", ("prefill", "long")), ("moe_capacity", ("train",))):
        if getattr(settings, name) and settings.mode not in modes:
            raise UserError(f"--{name} has no meaning with --mode={settings.mode}.",
                            f"It belongs to {' and '.join(modes)}.",
                            f"Leave it out, or give --mode={modes[0]}.")
