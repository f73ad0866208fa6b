"""Operations of single instructions of a compiled program."""

import collections
import json
import re
from typing import Any

import numpy as np

from mmx.plan.hlo_text import Computation, Instruction, Leaf, numbers


def counted(place: Computation, line: Instruction) -> collections.Counter:
    """Operations of `line` by the element type of its first operand; none for other lines.

    float32 counts as "tf32" unless the line asks for the highest precision.
    """
    counts: collections.Counter = collections.Counter()
    if line.op not in ("dot", "convolution", "custom-call"):
        return counts
    operands = place.operand_leaves(line)
    out = float(np.prod(line.leaves[0].dims, dtype=float)) if line.leaves else 0.0
    if line.op == "dot":
        over = numbers(line.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or "")
        lhs = operands[0][0]
        counts[_kind(line, lhs)] += 2 * out * float(np.prod([lhs.dims[dim] for dim in over]))
    elif line.op == "convolution":
        counts[_kind(line, operands[0][0])] += _convolution(
            line, operands[0][0].dims, operands[1][0].dims)
    elif line.target.startswith(("__cublas$", "__cublas_lt")):
        over = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', line.attributes)
        lhs = operands[0][0]
        counts[_kind(line, lhs)] += 2 * out * float(np.prod(
            [lhs.dims[dim] for dim in numbers(over[1])] if over else 1))
    elif estimate := _cost_estimate(line):
        counts["kernel"] += float(estimate.get("flops", 0))
    elif line.kernel_cost:
        counts["kernel"] += line.kernel_cost[0]
    return counts


def _kind(line: Instruction, lhs: Leaf) -> str:
    exact = re.search(r"operand_precision[^}\]]*highest", line.attributes, re.IGNORECASE)
    return "tf32" if lhs.dtype == "f32" and not exact else lhs.dtype


def _cost_estimate(line: Instruction) -> dict[str, Any]:
    """What the author of a Pallas kernel says that it costs."""
    found = line.attribute(r'"cost_estimate":(\{[^{}]*\})')
    return json.loads(found) if found else {}


def _convolution(line: Instruction, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> float:
    """Operations of a convolution; positions that fall on padding or dilation do nothing.

    TPUs write matrix products so, batched ones with the batch as a dilated window.
    """
    left, right, out = re.match(r"(\w+)_(\w+)->(\w+)",
                                line.attribute(r"dim_labels=([\w>\-]+)")).groups()
    window = {key: value.split("x") for key, value in re.findall(
        r"(\w+)=([\d_x\-]+)", line.attribute(r"window=\{([^}]*)\}") or "")}
    result = 2.0 * line.leaves[0].dims[out.index("b")] * line.leaves[0].dims[out.index("f")]
    result *= rhs[right.index("i")]
    for dim in range(sum(label.isdigit() for label in out)):
        def setting(name: str, default: str, dim: int = dim) -> str:
            return window.get(name, [])[dim] if dim < len(window.get(name, [])) else default

        low = int(setting("pad", "0_0").split("_")[0])
        stride, dilate = int(setting("stride", "1")), int(setting("lhs_dilate", "1"))
        spread = int(setting("rhs_dilate", "1"))
        size, kernel = lhs[left.index(str(dim))], rhs[right.index(str(dim))]
        outputs = line.leaves[0].dims[out.index(str(dim))]
        at = np.arange(outputs)[:, None] * stride - low + np.arange(kernel)[None] * spread
        result *= int(((at >= 0) & (at <= (size - 1) * dilate) & (at % dilate == 0)).sum())
    return result / int(line.attribute(r"batch_group_count=(\d+)") or 1)
