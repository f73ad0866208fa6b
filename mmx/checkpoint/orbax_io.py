"""Orbax checkpoints: any tree of arrays, JSON beside it, atomic, restored onto any sharding.

A checkpoint is a directory with `extra.json`, `mmx_config.json` when a model's config was given,
and `arrays/` written by orbax: leaves under `params` apart from the rest, so that a model is
loaded from a training checkpoint without the optimiser's state.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint.experimental.v1 as ocp
from jax.sharding import SingleDeviceSharding

from mmx.checkpoint import atomic
from mmx.checkpoint.hf_source import summary
from mmx.checkpoint.locate import ORBAX_CONFIG, copy_tokenizer, read_json
from mmx.checkpoint.target import ARRAYS, EXTRA, check_target
from mmx.config import ModelConfig
from mmx.errors import UserError
from mmx.model import param_specs
from mmx.quant import abstract_params, contracted_axes, lay, quantize, turned_back
from pallas_kernels.quantized import QuantizedTensor

_PARAMS, _REST = "params", "rest"
_SEP = "|"  # paths of parameters hold slashes


def save(directory: str | Path, tree: Any, extra: Mapping | None = None,
         config: ModelConfig | None = None, tokenizer_dir: str | Path | None = None) -> None:
    """Writes `tree` and the JSON `extra` to `directory`, replacing what is there, all or nothing.

    Every process of a job calls it with the same arguments on a file system they share. With
    `config` and a "params" entry in the tree the directory can be loaded as a model; the tokenizer
    files of `tokenizer_dir` are copied into it. Raises UserError where `directory` holds anything
    but a checkpoint.
    """
    directory = Path(directory).absolute()
    check_target(directory, overwrite=True)
    beside = atomic.beside(directory)
    if jax.process_index() == 0:
        atomic.begin(directory)
    atomic.barrier(f"begin {directory}")
    groups: dict[str, dict[str, Any]] = {}
    for key, leaf in _flatten(tree).items():
        groups.setdefault(_group(key), {})[key] = jnp.asarray(leaf)
    ocp.save_checkpointables(beside / ARRAYS, groups)
    if jax.process_index() == 0:
        atomic.write_json(beside / EXTRA, dict(extra or {}))
        if config is not None:
            atomic.write_json(beside / ORBAX_CONFIG, config.to_hf())
        if tokenizer_dir is not None:
            copy_tokenizer(tokenizer_dir, beside)
        atomic.swap(directory)
    atomic.barrier(f"end {directory}")


def restore(directory: str | Path, abstract_tree: Any) -> tuple[Any, dict]:
    """Returns (tree, extra) as saved, with the structure, dtypes and shardings asked for.

    Leaves of `abstract_tree` have shape, dtype and maybe a sharding (the default device
    otherwise). Raises UserError naming every leaf that is missing, unknown or of another shape.
    """
    directory = Path(directory).absolute()
    extra = read_json(directory / EXTRA)
    wanted = _flatten(abstract_tree)
    found = _shapes(directory)
    _compare(directory, {key: tuple(leaf.shape) for key, leaf in wanted.items()}, found)
    flat = _load(directory, wanted)
    leaves = [flat[key] for key in wanted]
    return jax.tree.unflatten(jax.tree.structure(abstract_tree), leaves), extra


def latest_step(root: str | Path) -> int | None:
    """The highest number that names a whole checkpoint under `root`, or None."""
    return max(_steps(Path(root)), default=None)


def keep_last(root: str | Path, count: int) -> None:
    """Deletes all but the `count` newest numbered checkpoints under `root` (process 0 does)."""
    if jax.process_index() == 0:
        for step in sorted(_steps(Path(root)))[:-count or None]:
            shutil.rmtree(Path(root) / str(step), ignore_errors=True)


def save_model(directory: str | Path, config: ModelConfig, params: Mapping,
               tokenizer_dir: str | Path | None = None) -> None:
    """Saves parameters as they are, int8 leaves included, with config and tokenizer; see `save`.

    Turned leaves are turned back, all at a time: load what is only to be saved with turned=False.
    """
    save(directory, {_PARAMS: turned_back(params)}, config=config, tokenizer_dir=tokenizer_dir)


def load_model(directory: Path, config: ModelConfig, *, dtype="bfloat16",
               quantize: str | None = None, shardings: Mapping | None = None,
               turned: bool | None = None) -> dict:
    """Returns the parameters of a checkpoint that was saved with a config.

    Parameters saved in int8 stay so; with `quantize`, the others that the rules name follow, one
    by one. `turned` as in `mmx.quant.turns`.
    """
    directory = Path(directory).absolute()
    found = _shapes(directory, _PARAMS)
    tree = {path: _with_sharding(path, spec, (shardings or {}).get(path))
            for path, spec in _as_stored(config, dtype, found).items()}
    wanted = _flatten({_PARAMS: tree})
    _compare(directory, {key: tuple(leaf.shape) for key, leaf in wanted.items()}, found)
    result, specs = {}, param_specs(config, dtype)
    if quantize is None:
        flat = _load(directory, wanted)
        params = jax.tree.unflatten(jax.tree.structure(tree), [flat.pop(key) for key in wanted])
        return lay(specs, {path: params.pop(path) for path in tree}, turned)
    for path, spec in tree.items():
        part = _flatten({_PARAMS: {path: spec}})
        flat = _load(directory, part)
        value = jax.tree.unflatten(jax.tree.structure(spec), [flat[key] for key in part])
        result |= lay(specs, {path: _quantized(path, value)}, turned)
    return result


def params_dtype(directory: Path) -> str:
    """Name of the dtype of the parameters that are not int8."""
    return {path: kind for path, _, kind in stored_params(directory)}["embed/weight"]


def stored_params(directory: Path) -> list[tuple[str, tuple[int, ...], str]]:
    """(path, shape, dtype name) of what is saved under "params"; int8 ones as values and scale."""
    return [(key.removeprefix(_PARAMS + _SEP).replace(_SEP, "/"), tuple(leaf.shape),
             str(jnp.dtype(leaf.dtype)))
            for key, leaf in _metadata(Path(directory).absolute()).items()
            if _group(key) == _PARAMS]


def problems(directory: Path, config: ModelConfig) -> dict[str, list[str]]:
    """What of the saved parameters does not fit `config`, by kind; empty when all does."""
    found = _shapes(Path(directory).absolute(), _PARAMS)
    wanted = _flatten({_PARAMS: _as_stored(config, "float32", found)})
    return _difference({key: tuple(leaf.shape) for key, leaf in wanted.items()}, found)


def _as_stored(config: ModelConfig, dtype, found: Mapping) -> dict:
    """Abstract parameters of `config`, int8 where the names in `found` say so."""
    int8 = abstract_params(config, dtype, "int8")
    return {path: int8[path] if f"{_PARAMS}{_SEP}{path}{_SEP}values" in found else spec
            for path, spec in abstract_params(config, dtype).items()}


def _quantized(path: str, value):
    axes = contracted_axes(path)
    return quantize(value, axes) if axes and not isinstance(value, QuantizedTensor) else value


def _with_sharding(path: str, spec, sharding):
    from mmx.checkpoint.hf_import import scale_sharding_of

    if not isinstance(spec, QuantizedTensor):
        if isinstance(sharding, QuantizedTensor):
            sharding = sharding.values
        return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding)
    if sharding is None:
        return spec
    if not isinstance(sharding, QuantizedTensor):
        sharding = QuantizedTensor(
            sharding, scale_sharding_of(sharding, spec.shape, contracted_axes(path)))
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        spec, sharding)


def _flatten(tree: Any) -> dict[str, Any]:
    """Leaves by a name made of their way through the tree, in the tree's own order."""
    return {jax.tree_util.keystr(path, simple=True, separator=_SEP): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _group(key: str) -> str:
    return _PARAMS if key.split(_SEP)[0] == _PARAMS else _REST


def _shapes(directory: Path, group: str | None = None) -> dict[str, tuple[int, ...]]:
    return {key: tuple(leaf.shape) for key, leaf in _metadata(directory).items()
            if group in (None, _group(key))}


def _metadata(directory: Path) -> dict[str, Any]:
    arrays = directory / ARRAYS
    if not arrays.is_dir():
        raise UserError(f"{directory} is not a checkpoint.", f"One has {ARRAYS}/ and {EXTRA}.",
                        "Check the path.")
    try:
        groups = ocp.checkpointables_metadata(arrays).metadata
    except Exception as error:  # orbax and tensorstore raise unrelated types
        raise _broken(directory, error) from error
    return {key: leaf for name in (_PARAMS, _REST)
            for key, leaf in (groups.get(name) or {}).items()}


def _difference(wanted: Mapping, found: Mapping) -> dict[str, list[str]]:
    """Names and shapes that differ, by kind of problem; empty when none does."""
    problems = {
        "missing": [key for key in wanted if key not in found],
        "unknown": [key for key in found if key not in wanted],
        "wrong shape": [f"{key} is {list(found[key])}, {list(wanted[key])} is needed"
                        for key in wanted if key in found and found[key] != wanted[key]],
    }
    return {kind: lines for kind, lines in problems.items() if lines}


def _compare(directory: Path, wanted: Mapping, found: Mapping):
    if problems := _difference(wanted, found):
        raise UserError(f"The checkpoint {directory} holds another tree than is to be restored.\n"
                        + "\n".join(f"  {line}" for line in summary(problems)),
                        "\nIt is restored whole, by name and shape.",
                        "Use the settings that it was saved with.")


def _load(directory: Path, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
    device = SingleDeviceSharding(jax.local_devices()[0])
    groups: dict[str, dict[str, Any]] = {}
    for key, leaf in wanted.items():
        groups.setdefault(_group(key), {})[key] = jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or device)
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    try:
        with context:
            loaded = ocp.load_checkpointables(directory / ARRAYS, groups)
    except Exception as error:  # orbax and tensorstore raise unrelated types
        raise _broken(directory, error) from error
    return {key: leaf for group in loaded.values() for key, leaf in group.items()}


def _broken(directory: Path, error: Exception) -> UserError:
    reason = (str(error).strip().splitlines() or [repr(error)])[0]
    return UserError(f"The checkpoint {directory} cannot be read: {reason[:300]}",
                     "Its files must be whole and of this orbax version.",
                     "Use another checkpoint of the same run.")


def _steps(root: Path) -> list[int]:
    if not root.is_dir():
        return []
    return [int(path.name) for path in root.iterdir()
            if path.name.isdigit() and (path / EXTRA).exists()]
