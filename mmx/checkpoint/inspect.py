"""What tensors a model has: of a geometry without any weights, or as files really hold them."""

import dataclasses
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from mmx.checkpoint.hf_files import DTYPES, TensorRef
from mmx.checkpoint.hf_names import ORIGINAL, entries, layer_of
from mmx.checkpoint.hf_source import check
from mmx.checkpoint.locate import ORBAX_CONFIG, load_config, locate
from mmx.config import ModelConfig, preset, preset_names


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One tensor: published name, shape, dtype name, bytes, global layer index or None."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    layer: int | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """What a model's tensors are.

    Attributes:
      model: as asked for.
      config: its geometry.
      tensors: in file order for a geometry, by name for files.
      problems: kind -> sentences; empty when every tensor is there and fits.
      notes: what a loader ignores.
      checked: whether files were read, rather than the geometry alone.
    """

    model: str
    config: ModelConfig
    tensors: list[TensorInfo]
    problems: dict[str, list[str]]
    notes: list[str]
    checked: bool

    @property
    def parameters(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors)

    def to_json(self) -> dict:
        """Everything as plain JSON values."""
        return {"model": self.model, "checked": self.checked, "count": len(self.tensors),
                "parameters": self.parameters, "bytes": self.bytes, "problems": self.problems,
                "notes": self.notes,
                "tensors": [dataclasses.asdict(t) | {"shape": list(t.shape)}
                            for t in self.tensors]}


def tensor_table(config: ModelConfig | str, layout: str = ORIGINAL, dtype: str = "bfloat16"
                 ) -> list[TensorInfo]:
    """Every tensor of a checkpoint of `config` (or of a preset by name); needs no weights."""
    config = preset(config) if isinstance(config, str) else config
    itemsize = np.dtype(jnp.dtype(dtype)).itemsize
    return [TensorInfo(entry.name, entry.shape, str(jnp.dtype(dtype)), entry.size * itemsize,
                       entry.layer) for entry in entries(config, layout)]


def inspect(model: str | Path, layout: str | None = None, dtype: str = "bfloat16") -> Report:
    """Reports on a preset's geometry, or on what a model directory's files hold.

    With `layout` the answer is the table of the model's geometry in that layout and `dtype`, even
    for a directory; without, a directory's headers are read and compared with its config.
    """
    name = str(model)
    if name in preset_names() and (layout is not None or not _has_weights(name)):
        config = preset(name)
        return Report(name, config, tensor_table(config, layout or ORIGINAL, dtype), {}, [], False)
    folder = locate(model)
    config = load_config(folder)
    if layout is not None:
        return Report(name, config, tensor_table(config, layout, dtype), {}, [], False)
    if (folder / ORBAX_CONFIG).exists():
        from mmx.checkpoint import orbax_io

        tensors = [TensorInfo(path, shape, kind, math.prod(shape) * jnp.dtype(kind).itemsize)
                   for path, shape, kind in orbax_io.stored_params(folder)]
        return Report(name, config, tensors, orbax_io.problems(folder, config), [], True)
    found = check(config, folder)
    tensors = [_info(name_, ref) for name_, ref in sorted(found.files.items(), key=_by_place)]
    return Report(name, config, tensors, found.problems, found.notes, True)


def _has_weights(name: str) -> bool:
    return name == "nano" and (locate(name) / "config.json").exists()


def _by_place(item: tuple[str, TensorRef]):
    layer = layer_of(item[0])
    return (-1 if layer is None else layer, item[0])


def _info(name: str, ref: TensorRef) -> TensorInfo:
    kind = DTYPES[ref.dtype].name if ref.dtype in DTYPES else ref.dtype
    return TensorInfo(name, ref.shape, kind, ref.nbytes, layer_of(name))
