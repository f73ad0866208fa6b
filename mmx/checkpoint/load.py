"""One door for loading parameters, whatever the checkpoint is."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmx.checkpoint.hf_import import Progress, import_params
from mmx.checkpoint.hf_source import HfSource
from mmx.checkpoint.locate import ORBAX_CONFIG, load_config, locate
from mmx.config import ModelConfig
from mmx.quant import check_mode

Shardings = Mapping[str, Any] | Callable[[ModelConfig], Mapping[str, Any]]


def load_params(path_or_id: str | Path, config: ModelConfig | None = None, *,
                dtype: str = "bfloat16", quantize: str | None = None,
                shardings: Shardings | None = None, max_host_bytes: int = 2 << 30,
                progress: Progress | None = None, turned: bool | None = None
                ) -> tuple[ModelConfig, dict]:
    """Returns (config, params) of a model directory, hub id, "nano", or checkpoint of mmx.

    Args:
      path_or_id: see `locate`.
      config: used instead of the directory's own; the weights must fit it.
      dtype: of parameters that are not quantised.
      quantize: "int8" or None; a checkpoint saved in int8 stays so.
      shardings: path -> Sharding, or a function of the config that returns it; the default device
        where absent.
      max_host_bytes: bound on host memory besides the result.
      progress: called with (done, total) elements.
      turned: how int8 matrices lie, see `mmx.quant.turns`; as the device reads them best if None.

    Raises UserError listing everything that does not fit.
    """
    check_mode(quantize)
    directory = locate(path_or_id)
    config = config or load_config(directory)
    shardings = shardings(config) if callable(shardings) else shardings
    if (directory / ORBAX_CONFIG).exists():
        from mmx.checkpoint.orbax_io import load_model

        return config, load_model(directory, config, dtype=dtype, quantize=quantize,
                                  shardings=shardings, turned=turned)
    with HfSource(config, directory) as source:
        return config, import_params(source, dtype=dtype, quantize=quantize, shardings=shardings,
                                     max_host_bytes=max_host_bytes, progress=progress,
                                     turned=turned)
