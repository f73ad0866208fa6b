"""List the tensors of a checkpoint, or of a preset without any weights, and check that all fit.

A directory's files are read (headers alone) and compared with its config.json.
"""

import dataclasses
import json
import sys

from mmx.cli.settings import setting

EXAMPLE = """
mmx inspect --model=text01 --layout=original
mmx inspect --model=DIR --check
mmx inspect --model=DIR --layout=transformers --json
"""
WORD = "model"


@dataclasses.dataclass(frozen=True)
class InspectSettings:
    model: str = setting("nano", "A checkpoint directory, a hub id, or a preset; also without "
                         "the flag.", group="Model")
    layout: str | None = setting(
        None, "Names and shapes of this published layout; for a directory, instead of its files'.",
        group="Model", choices=("original", "transformers"))
    dtype: str = setting("bfloat16", "Number format of a preset's tensors.", group="Model",
                         choices=("bfloat16", "float16", "float32"))
    check: bool = setting(False, "Only tell whether every tensor is there and fits.",
                          group="Output")
    json: bool = setting(False, "Write one JSON object.", group="Output")


Settings = InspectSettings


def run(call) -> int:
    """Lists or checks; 2 when a tensor is missing, unknown, mis-shaped or cut off."""
    settings = call.settings
    from mmx.checkpoint import inspect
    from mmx.obs.memory import human

    report = inspect.inspect(settings.model, settings.layout, settings.dtype)
    if settings.json:
        found = report.to_json()
        if settings.check:
            del found["tensors"]
        print(json.dumps(found, ensure_ascii=False))
    elif not settings.check:
        _table(report.tensors, human)
    total = (f"{len(report.tensors):,} tensors, {report.parameters:,} parameters, "
             f"{human(report.bytes)}")
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    if report.problems:
        for kind, sentences in report.problems.items():
            print(f"{kind}:", *sentences, sep="\n  ", file=sys.stderr)
        count = sum(map(len, report.problems.values()))
        print(f"mmx: {settings.model} does not fit its config.json: {count} problem"
              f"{'s' * (count > 1)}, listed above. Fetch or write the files again.",
              file=sys.stderr)
        return 2
    state = "complete and in shape" if report.checked else "a geometry, no weights read"
    print(f"{settings.model}: {total}; {state}",
          file=sys.stderr if settings.json else sys.stdout)
    return 0


def _table(tensors, human) -> None:
    rows = [(one.name, "×".join(map(str, one.shape)), one.dtype, human(one.bytes))
            for one in tensors]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for name, shape, dtype, size in rows:
        print(f"{name:<{widths[0]}}  {shape:<{widths[1]}}  {dtype:<{widths[2]}}  "
              f"{size:>{widths[3]}}")
