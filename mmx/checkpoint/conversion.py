"""From one checkpoint layout to another."""

import time
from pathlib import Path

from mmx.checkpoint.hf_export import (
    DEFAULT_SHARD_BYTES,
    SourceReader,
    save_hf,
    write_hf,
)
from mmx.checkpoint.hf_import import Progress
from mmx.checkpoint.hf_names import LAYOUTS, entries
from mmx.checkpoint.hf_source import HfSource
from mmx.checkpoint.load import load_params
from mmx.checkpoint.locate import ORBAX_CONFIG, load_config, locate
from mmx.checkpoint.target import check_target
from mmx.errors import UserError
from mmx.quant import check_mode

ORBAX = "orbax"
TARGETS = (*LAYOUTS, ORBAX)


def convert(source: str | Path, target: str | Path, *, layout: str = "original",
            dtype: str | None = None, quantize: str | None = None,
            max_host_bytes: int = 2 << 30, max_shard_bytes: int = DEFAULT_SHARD_BYTES,
            overwrite: bool = False, progress: Progress | None = None) -> dict:
    """Writes the model `source` to the directory `target` in another layout, with its tokenizer.

    Between the published layouts it streams within `max_host_bytes` and loads nothing; to or from
    orbax the parameters pass through the devices' memory. `dtype` is the source's own by default;
    `quantize="int8"` is for orbax, as the published layouts hold no int8.

    Returns a summary: source, target, layout, dtype, quantize, tensors, parameters, seconds.
    Raises UserError on anything that does not fit, leaving nothing behind.
    """
    if layout not in TARGETS:
        raise UserError(f"There is no checkpoint layout '{layout}'.",
                        f"Layouts are {', '.join(TARGETS)}.", "Name one of them.")
    check_mode(quantize)
    if quantize is not None and layout != ORBAX:
        raise UserError(f"Layout '{layout}' cannot hold {quantize} weights.",
                        "The published layouts are bfloat16, float16 or float32.",
                        f"Use layout '{ORBAX}', or quantise when loading.")
    began = time.monotonic()
    check_target(target, overwrite)
    folder, target = locate(source), Path(target).absolute()
    config = load_config(folder)
    from_orbax = (folder / ORBAX_CONFIG).exists()
    common = dict(max_shard_bytes=max_shard_bytes, max_host_bytes=max_host_bytes,
                  overwrite=overwrite, progress=progress)
    if layout != ORBAX and not from_orbax:
        with HfSource(config, folder) as weights:
            dtype = dtype or weights.dtype
            write_hf(target, config, SourceReader(weights, dtype), layout=layout, dtype=dtype,
                     tokenizer_dir=folder, **common)
    else:
        dtype = dtype or _dtype(config, folder, from_orbax)
        _, params = load_params(folder, config, dtype=dtype, quantize=quantize,
                                max_host_bytes=max_host_bytes, progress=progress, turned=False)
        if layout == ORBAX:
            from mmx.checkpoint import orbax_io

            orbax_io.save_model(target, config, params, tokenizer_dir=folder)
        else:
            save_hf(target, config, params, layout, dtype, tokenizer_dir=folder, **common)
    tensors = entries(config, layout if layout != ORBAX else "original")
    return {"source": str(source), "target": str(target), "layout": layout, "dtype": dtype,
            "quantize": quantize, "tensors": len(tensors),
            "parameters": sum(entry.size for entry in tensors),
            "seconds": round(time.monotonic() - began, 3)}


def _dtype(config, folder: Path, from_orbax: bool) -> str:
    if from_orbax:
        from mmx.checkpoint import orbax_io

        return orbax_io.params_dtype(folder)
    with HfSource(config, folder) as weights:
        return weights.dtype

