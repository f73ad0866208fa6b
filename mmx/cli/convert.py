"""Rewrite a checkpoint in another layout or precision, within a bound on host memory."""

import dataclasses
import json

from mmx.cli.hosts import refuse_several
from mmx.cli.settings import setting
from mmx.cli.shared import check_output
from mmx.errors import UserError

EXAMPLE = """
mmx convert --model=DIR --output=DIR_HF --layout=transformers
mmx convert --model=DIR --output=DIR_INT8 --layout=orbax --quantize=int8
"""


@dataclasses.dataclass(frozen=True)
class ConvertSettings:
    model: str = setting("nano", "A checkpoint directory, or a hub id.", group="Input")
    max_host_bytes: int = setting(2 << 30, "Host memory that it may take.", group="Input",
                                  low=1 << 20, size=True)
    output: str | None = setting(None, "Directory to write; it must be new or empty.",
                                 group="Output", value="DIR")
    layout: str = setting(
        "original", "safetensors under the original or the transformers names, or orbax.",
        group="Output", choices=("original", "transformers", "orbax"))
    dtype: str | None = setting(None, "Number format; that of the source unless given.",
                                group="Output", choices=("bfloat16", "float16", "float32"))
    quantize: str | None = setting(None, "Hold the large matrices in 8 bits; for orbax.",
                                   group="Output", choices=("int8",))
    max_shard_bytes: int = setting(2_200_000_000, "Size of one safetensors file.", group="Output",
                                   low=1 << 20, size=True)
    overwrite: bool = setting(
        False, "Replace the checkpoint in the output directory, which may hold nothing else.",
        group="Output")
    json: bool = setting(False, "Tell what was done as one JSON object.", group="Output")


Settings = ConvertSettings


def run(call) -> None:
    """Converts; the output directory appears whole or not at all."""
    settings = call.settings
    if not settings.output:
        raise UserError("There is no --output.", "A conversion needs a directory to write.",
                        "Add --output=DIR.")
    refuse_several("convert")
    from pathlib import Path

    # It is written beside its place, then renamed.
    check_output(str(Path(settings.output).absolute().parent), folder=True)
    from mmx.checkpoint import convert
    from mmx.obs import log, memory
    from mmx.obs.progress import Progress

    call.announce()
    with Progress(None, "parameters", title="convert") as bar:
        summary = convert(
            settings.model, settings.output, layout=settings.layout, dtype=settings.dtype,
            quantize=settings.quantize, max_host_bytes=settings.max_host_bytes,
            max_shard_bytes=settings.max_shard_bytes, overwrite=settings.overwrite,
            progress=bar.reach)
    call.save(Path(settings.output) / "operative_config.gin")
    if settings.json:
        print(json.dumps({**summary, "peak_memory_bytes": memory.host_peak_bytes()}))
        return
    log.note(f"wrote {settings.output}: {summary['tensors']:,} tensors, "
             f"{summary['parameters']:,} parameters in {summary['dtype']}, layout "
             f"{summary['layout']}, {summary['seconds']:.1f} s, {memory.summary()}")
