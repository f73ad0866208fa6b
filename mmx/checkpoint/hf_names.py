"""Two-way table between parameters and the tensors of the published checkpoint layouts.

A published matrix is [out, in] and may stand for one slice of a stacked parameter. Both sides are
described by axis letters (the project's shape letters, `c` for gate/up, `t` for q/k/v), so a
tensor is read or written by slicing, one transposition, and nothing layer-specific.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

from mmx.config import ModelConfig
from mmx.errors import UserError
from mmx.quant import contracted_axes

ORIGINAL = "original"
TRANSFORMERS = "transformers"
LAYOUTS = (ORIGINAL, TRANSFORMERS)


@dataclasses.dataclass(frozen=True)
class Kind:
    """Axis letters of a parameter (without repeats) and of its tensors in each layout.

    A layout lists (name, letters in file order with a space between file dimensions, fixed
    letters); `{E}` in a name means one tensor per expert. `contracted` are the axes summed over by
    the layer's product; parameters without any are never quantised.
    """

    axes: str
    original: tuple[tuple[str, str, Mapping[str, int]], ...]
    transformers: tuple[tuple[str, str, Mapping[str, int]], ...] = ()

    def tensors(self, layout: str):
        return self.transformers or self.original if layout == TRANSFORMERS else self.original


def _plain(axes: str, name: str, file_axes: str | None = None) -> Kind:
    return Kind(axes, ((name, file_axes or " ".join(axes), {}),))


_EXPERT = "block_sparse_moe.experts.{E}."
KINDS = {
    "embed/weight": _plain("VD", "model.embed_tokens.weight"),
    "norm/weight": _plain("D", "model.norm.weight"),
    "head/weight": _plain("VD", "lm_head.weight"),
}
LIGHTNING_KINDS = {
    "attn/qkv": _plain("DNtH", "self_attn.qkv_proj.weight", "NtH D"),
    "attn/gate": _plain("DNH", "self_attn.output_gate.weight", "NH D"),
    "attn/norm/weight": _plain("NH", "self_attn.norm.weight", "NH"),
    "attn/out": _plain("NHD", "self_attn.out_proj.weight", "D NH"),
}
SOFTMAX_KINDS = {
    "attn/q": _plain("DNH", "self_attn.q_proj.weight", "NH D"),
    "attn/k": _plain("DKH", "self_attn.k_proj.weight", "KH D"),
    "attn/v": _plain("DKH", "self_attn.v_proj.weight", "KH D"),
    "attn/out": _plain("NHD", "self_attn.o_proj.weight", "D NH"),
}
BLOCK_KINDS = {
    "attn_norm/weight": _plain("D", "input_layernorm.weight"),
    "mlp_norm/weight": _plain("D", "post_attention_layernorm.weight"),
    "moe/router": Kind("DE", (("block_sparse_moe.gate.weight", "E D", {}),),
                       (("mlp.gate.weight", "E D", {}),)),
    "moe/gate_up": Kind("cEDF", ((_EXPERT + "w1.weight", "F D", {"c": 0}),
                                 (_EXPERT + "w3.weight", "F D", {"c": 1})),
                        (("mlp.experts.gate_up_proj", "E cF D", {}),)),
    "moe/down": Kind("EFD", ((_EXPERT + "w2.weight", "D F", {}),),
                     (("mlp.experts.down_proj", "E D F", {}),)),
}
_ATTENTION_KINDS = {"lightning": LIGHTNING_KINDS, "softmax": SOFTMAX_KINDS}

# Recomputed in float32, or part of the vision tower, which this software does not run.
IGNORED = re.compile(
    r"self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)$|rotary_emb\.inv_freq$")
VISION = re.compile(r"^(model\.)?(vision_tower\.|multi_modal_projector\.|image_newline$)")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint and the slice of a parameter that it holds.

    Attributes:
      name: the tensor's published name.
      shape: its shape in the file.
      axes: letters of `view`, in file order.
      view: `shape` with joined axes split apart.
      path: the parameter.
      param_axes: letters of the parameter, repeats `R` first inside stacks.
      at: index of each parameter axis that the tensor does not span.
      contracted: letters summed over by the layer's product, empty where never quantised.
      layer: global layer index, None outside the layers.
    """

    name: str
    shape: tuple[int, ...]
    axes: str
    view: tuple[int, ...]
    path: str
    param_axes: str
    at: Mapping[str, int]
    contracted: str
    layer: int | None

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def check_layout(layout: str):
    if layout not in LAYOUTS:
        raise UserError(f"There is no checkpoint layout '{layout}'.",
                        f"Layouts are {', '.join(LAYOUTS)}.", "Name one of them.")


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """Size of every axis letter but the repeats."""
    return dict(V=config.vocab_size, D=config.hidden_size, N=config.num_heads,
                K=config.num_kv_heads, H=config.head_dim, E=config.num_experts,
                F=config.expert_dim, c=2, t=3)


def entries(config: ModelConfig, layout: str = ORIGINAL) -> list[Entry]:
    """Every tensor of a checkpoint of `config`, in file order: embedding, layers, norm, head."""
    check_layout(layout)
    groups = entry_groups(config)
    return [entry for group in groups for entry in group[layout]]


def entry_groups(config: ModelConfig) -> list[dict[str, list[Entry]]]:
    """The same by parameter and repeat: each group has its tensors in either layout."""
    sizes = axis_sizes(config)
    groups = [_group("embed/weight", KINDS["embed/weight"], sizes)]
    for g, stack in enumerate(config.stacks):
        for repeat in range(stack.repeats):
            for position, layer_type in enumerate(stack.pattern):
                layer = stack.layer_index(repeat, position)
                for suffix, kind in (BLOCK_KINDS | _ATTENTION_KINDS[layer_type]).items():
                    groups.append(_group(f"stack/{g}/{position}/{suffix}", kind, sizes,
                                         repeat, layer))
    return groups + [_group(path, KINDS[path], sizes) for path in ("norm/weight", "head/weight")]


def _group(path, kind: Kind, sizes, repeat=None, layer=None) -> dict[str, list[Entry]]:
    param_axes = ("" if layer is None else "R") + kind.axes
    contracted = "".join(param_axes[i] for i in contracted_axes(path))
    group = {}
    for layout in LAYOUTS:
        group[layout] = []
        experts = "{E}" in kind.tensors(layout)[0][0]
        for expert in range(sizes["E"]) if experts else [None]:
            for name, file_axes, fixed in kind.tensors(layout):
                at = dict(fixed)
                if expert is not None:
                    name, at["E"] = name.replace("{E}", str(expert)), expert
                if layer is not None:
                    name, at["R"] = f"model.layers.{layer}.{name}", repeat
                axes = file_axes.replace(" ", "")
                group[layout].append(Entry(
                    name=name, axes=axes, path=path, at=at, layer=layer,
                    shape=tuple(math.prod(sizes[a] for a in part) for part in file_axes.split()),
                    view=tuple(sizes[a] for a in axes), param_axes=param_axes,
                    contracted=contracted))
    return group


def canonical(name: str) -> str:
    """A published name without a vision wrapper's prefix, experts under one module name."""
    for prefix, plain in (("language_model.", ""), ("model.language_model.", "model.")):
        if name.startswith(prefix):
            name = plain + name.removeprefix(prefix)
            break
    return name.replace(".mlp.", ".block_sparse_moe.", 1)


def layer_of(name: str) -> int | None:
    """Global layer index in a published name, None where it belongs to no layer."""
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return None if found is None or VISION.search(name) else int(found[1])


@dataclasses.dataclass
class Match:
    """Tensors of a checkpoint put beside those that a model needs.

    found: (published name, entry) for each tensor to read. missing, unknown, ignored, vision:
    names. doubled: pairs of names that mean the same tensor.
    """

    found: list[tuple[str, Entry]]
    missing: list[str]
    unknown: list[str]
    ignored: list[str]
    vision: list[str]
    doubled: list[tuple[str, str]]


def match(config: ModelConfig, names: Iterable[str]) -> Match:
    """Matches published names with the model's parameters, each layer in whichever layout it has.

    Original and fused experts, and names with a vision wrapper's prefix, may be mixed.
    """
    result = Match([], [], [], [], [], [])
    plain: dict[str, str] = {}
    for name in names:
        if VISION.search(name):
            result.vision.append(name)
        elif IGNORED.search(name):
            result.ignored.append(name)
        elif canonical(name) in plain:
            result.doubled.append((plain[canonical(name)], name))
        else:
            plain[canonical(name)] = name
    groups = entry_groups(config)
    # A group with nothing in either layout is reported in the layout of the rest.
    usual = TRANSFORMERS if any(name.endswith("experts.down_proj") for name in plain) else ORIGINAL
    used = set()
    for group in groups:
        layout = next((layout for layout in (usual, *LAYOUTS)
                       if any(canonical(entry.name) in plain for entry in group[layout])), usual)
        for entry in group[layout]:
            key = canonical(entry.name)
            if key in plain:
                used.add(key)
                result.found.append((plain[key], entry))
            else:
                result.missing.append(entry.name)
    result.unknown = [name for key, name in plain.items() if key not in used]
    return result
